"""What ``m4ov kernels tune`` searches, kernel by kernel: the candidate configurations and a problem to judge them by.

A problem runs the launcher of the family, so that what is measured is what a call runs; where the launcher starts two
kernels, both are in the time, which compares candidates all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_bench import gate
from m4ov_kernels.activation import reference as activation_reference
from m4ov_kernels.activation import triton as activation
from m4ov_kernels.gpu import Config
from m4ov_kernels.head import chunked
from m4ov_kernels.head import triton as head
from m4ov_kernels.norm import reference as norm_reference
from m4ov_kernels.norm import triton as norm

EPS = 1e-6


@dataclass(frozen=True)
class Problem:
    """``prepare()``: fresh inputs where ``call()`` overwrites them, NaN in its outputs. ``results()``: what it made, to
    be judged against ``plain`` (PyTorch in the same dtype) and ``exact`` (float64), by these ``names``."""

    prepare: Callable[[], object]
    call: Callable[[], object]
    results: Callable[[], Sequence[Tensor]]
    names: Sequence[str]
    plain: Sequence[Tensor]
    exact: Sequence[Tensor]


@dataclass(frozen=True)
class Size:
    """``elements`` of a problem's main tensor, which gives its rows; ``wide``: the width where a row has no bound."""

    elements: int
    wide: int


GPU = Size(elements=2**25, wide=16384)  # 64 MiB in bf16: beyond an H200's 50 MB of L2


@dataclass(frozen=True)
class Tunable:
    """``candidates(width)``: configurations worth measuring; ``width=None``: of the row without a bound."""

    kernel: str
    candidates: Callable[[int | None], Iterator[Config]]
    problem: Callable[[int, torch.dtype, torch.device, Size], Problem]


def _warps(elements: int) -> Iterator[int]:
    """Warps that leave each thread of a block of so many elements between 4 and 64 of them."""
    return (warps for warps in (1, 2, 4, 8, 16, 32) if 4 <= elements / (32 * warps) <= 64)


def _whole_rows(width: int | None) -> Iterator[Config]:
    assert width is not None
    for tile in (1024, 2048, 4096, 512, 8192):
        if tile >= width or tile == 1024:
            rows = max(1, tile // width)
            for warps in _warps(rows * width):
                yield Config({"BLOCK_ROWS": rows, "BLOCK_D": width}, warps)


def _blocks(name: str, *sizes: int) -> Callable[[int | None], Iterator[Config]]:
    def candidates(width: int | None) -> Iterator[Config]:
        for size in sizes:
            for warps in _warps(size):
                yield Config({name: size}, warps)

    return candidates


def _tiles(first: str, second: str, *shapes: tuple[int, int]) -> Callable[[int | None], Iterator[Config]]:
    def candidates(width: int | None) -> Iterator[Config]:
        for rows, columns in shapes:
            for warps in _warps(rows * columns):
                yield Config({first: rows, second: columns}, warps)

    return candidates


def _gated_tiles(width: int | None) -> Iterator[Config]:
    columns = (width,) if width else (512, 1024, 2048, 4096, 8192)
    for tile in (2048, 1024, 4096, 8192):
        for block in columns:
            if block <= tile and (width or block == tile):
                for warps in _warps(tile):
                    yield Config({"BLOCK_ROWS": tile // block, "BLOCK_D": block}, warps)


def _randn(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _poison(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.fill_(float("nan"))


def _norm(backward: bool) -> Callable[[int, torch.dtype, torch.device, Size], Problem]:
    def problem(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
        rows = max(2, size.elements // width)
        x, added, grad, grad_total = (_randn((rows, width), dtype, device) for _ in range(4))
        weight = _randn((width,), dtype, device)

        def definition(hidden: Tensor, scale: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            normed, total = norm_reference.rms_norm(hidden, scale, EPS, residual, "hf")[:2]
            return normed, total

        inputs = (x.requires_grad_(backward), weight.requires_grad_(backward), added)
        grads = (grad, grad_total)

        def judged(*, double: bool) -> list[Tensor]:
            tensors = [t.double() if double else t for t in inputs]
            if not backward:
                return list(definition(*tensors))
            return gate.differentiated(definition, tensors, [g.double() if double else g for g in grads])[2:]

        plain, exact = judged(double=False), judged(double=True)
        x, weight = x.detach(), weight.detach()
        forward_out = (torch.empty_like(x), torch.empty_like(x), torch.empty(rows, device=device))
        norm.rms_norm_fwd(x, weight, added, EPS, "hf", out=forward_out)
        _, total, rstd = forward_out
        out = (torch.empty_like(x), torch.empty_like(weight))

        def run() -> None:
            if backward:
                norm.rms_norm_bwd(grad, grad_total, total, weight, rstd, "hf", True, out=out)
            else:
                norm.rms_norm_fwd(x, weight, added, EPS, "hf", out=forward_out)

        made = out if backward else forward_out
        names = ("grad_hidden_states", "grad_weight") if backward else ("normed", "sum")
        return Problem(lambda: _poison(made), run, lambda: made[:2], names, plain, exact)

    return problem


def _swiglu(backward: bool) -> Callable[[int, torch.dtype, torch.device, Size], Problem]:
    def problem(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
        rows = max(2, size.elements // width)
        if width == size.wide:  # dense
            gated, up = (_randn((rows, width), dtype, device) for _ in range(2))
        else:  # the halves of one projection
            gated, up = _randn((rows, 2 * width), dtype, device).chunk(2, -1)
        grad = _randn((rows, width), dtype, device)

        def definition(a: Tensor, b: Tensor) -> Tensor:
            return activation_reference.swiglu(a, b, "hf")

        def judged(*, double: bool) -> list[Tensor]:
            tensors = [t.double() if double else t for t in (gated, up)]
            if not backward:
                return [definition(*tensors)]
            leaves = [t.detach().requires_grad_() for t in tensors]
            return gate.differentiated(definition, leaves, [grad.double() if double else grad])[1:]

        out = tuple(torch.empty_like(grad) for _ in range(1 + backward))

        def run() -> None:
            if backward:
                activation.swiglu_bwd(grad, gated, up, "hf", out=(out[0], out[1]))
            else:
                activation.swiglu_fwd(gated, up, "hf", out=out[0])

        names = ("grad_gate", "grad_up") if backward else ("out",)
        plain, exact = judged(double=False), judged(double=True)
        return Problem(lambda: _poison(out), run, lambda: out, names, plain, exact)

    return problem


def _cross_entropy_fwd(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
    rows = max(2, size.elements // width)
    logits = _randn((rows, width), dtype, device)
    target = torch.randint(width, (rows,), device=device)
    state = torch.empty(4, rows, device=device)

    def prepare() -> None:
        state.zero_()
        state[0] = float("-inf")

    def judged(values: Tensor) -> list[Tensor]:
        return [values.logsumexp(-1), values.gather(1, target[:, None])[:, 0]]

    return Problem(
        prepare,
        lambda: head.EPILOGUE.reduce(logits, target, 0, state, False),
        lambda: (state[1].log() + state[0], state[2]),
        ("logsumexp", "target's logit"),
        judged(logits.float()),
        judged(logits.double()),
    )


def _cross_entropy_bwd(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
    rows = max(2, size.elements // width)
    logits = _randn((rows, width), dtype, device)
    target = torch.randint(width, (rows,), device=device)
    maximum = logits.amax(-1).float()
    log_sum = (logits.double() - maximum[:, None]).logsumexp(-1)
    normalizer = torch.stack([maximum, log_sum.float()], -1).contiguous()
    grad_loss = torch.rand(rows, device=device) + 0.5
    gradient = torch.empty_like(logits)

    def judged(values: Tensor) -> list[Tensor]:
        wide = torch.promote_types(values.dtype, torch.float32)  # as the reference computes it

        def loss(x: Tensor) -> Tensor:
            return F.cross_entropy(x.to(wide), target, reduction="none")

        return gate.differentiated(loss, [values.detach().requires_grad_()], [grad_loss.to(wide)])[1:]

    return Problem(
        lambda: _poison([gradient]),
        lambda: head.EPILOGUE.differentiate(logits, gradient, target, 0, normalizer, grad_loss, 1.0, 0.0),
        lambda: (gradient,),
        ("gradient",),
        judged(logits),
        judged(logits.double()),
    )


def _accumulate(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
    addend = _randn((size.elements,), dtype, device)
    accumulator = torch.randn(size.elements + chunked.ACCUMULATOR_ALIGN, device=device)
    out = torch.empty_like(addend)
    held = accumulator[: size.elements]
    return Problem(
        lambda: _poison([out]),
        lambda: head.EPILOGUE.add(accumulator, addend, out, False),
        lambda: (out,),
        ("sum",),
        [(held + addend.float()).to(dtype)],
        [held.double() + addend.double()],
    )


TUNABLES = (
    Tunable("rms_norm_fwd", _whole_rows, _norm(False)),
    Tunable("rms_norm_bwd", _whole_rows, _norm(True)),
    Tunable("swiglu_fwd", _gated_tiles, _swiglu(False)),
    Tunable("swiglu_bwd", _gated_tiles, _swiglu(True)),
    # A chunk of the vocabulary is a multiple of CPU_COLUMNS, which the forward's block must divide.
    Tunable("cross_entropy_fwd", _blocks("BLOCK", 2048, 1024, 512), _cross_entropy_fwd),
    Tunable("cross_entropy_bwd", _blocks("BLOCK", 2048, 1024, 4096, 8192), _cross_entropy_bwd),
    Tunable("accumulate", _blocks("BLOCK", 1024, 2048, 4096, 8192), _accumulate),
    Tunable("rms_norm_fwd_wide", _blocks("BLOCK_D", 4096, 2048, 8192, 1024), _norm(False)),
    Tunable("rms_norm_bwd_wide", _blocks("BLOCK_D", 4096, 2048, 8192, 1024), _norm(True)),
    Tunable(
        "rms_norm_bwd_weight",
        _tiles("BLOCK_ROWS", "BLOCK_D", (4, 1024), (8, 512), (4, 512), (2, 1024), (8, 1024)),
        _norm(True),
    ),
    Tunable(
        "rms_norm_bwd_reduce",
        _tiles("BLOCK_PARTIALS", "BLOCK_D", (16, 128), (32, 64), (32, 128), (8, 128), (16, 64)),
        _norm(True),
    ),
)

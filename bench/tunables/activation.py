"""Tunable kernels of the activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from m4ov_bench import gate
from m4ov_bench.tunables.problem import Problem, Size, Tunable, poison, randn, warp_counts
from m4ov_kernels.activation import reference as activation_reference
from m4ov_kernels.activation import triton as activation
from m4ov_kernels.gpu import Config


def gated_tiles(width: int | None) -> Iterator[Config]:
    columns = (width,) if width else (512, 1024, 2048, 4096, 8192)
    for tile in (2048, 1024, 4096, 8192):
        for block in columns:
            if block <= tile and (width or block == tile):
                for warps in warp_counts(tile):
                    yield Config({"BLOCK_ROWS": tile // block, "BLOCK_D": block}, warps)


def _gated(name: str, backward: bool) -> Callable[[int, torch.dtype, torch.device, Size], Problem]:
    options = ("hf",) if name == "swiglu" else ("tanh", "hf")
    definition = getattr(activation_reference, name)
    fwd, bwd = getattr(activation, f"{name}_fwd"), getattr(activation, f"{name}_bwd")

    def problem(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
        rows = max(2, size.elements // width)
        if width == size.wide:  # dense
            gated, up = (randn((rows, width), dtype, device) for _ in range(2))
        else:  # the halves of one projection
            gated, up = randn((rows, 2 * width), dtype, device).chunk(2, -1)
        grad = randn((rows, width), dtype, device)
        out = tuple(torch.empty_like(grad) for _ in range(1 + backward))

        def run() -> None:
            if backward:
                bwd(grad, gated, up, *options, out=(out[0], out[1]))
            else:
                fwd(gated, up, *options, out=out[0])

        names = ("grad_gate", "grad_up") if backward else ("out",)
        return _problem(lambda *t: definition(*t, *options), [gated, up], grad, backward, run, out, names)

    return problem


def _gelu(backward: bool) -> Callable[[int, torch.dtype, torch.device, Size], Problem]:
    def problem(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
        rows = max(2, size.elements // width)
        x, grad = (randn((rows, width), dtype, device) for _ in range(2))
        bias = randn((width,), dtype, device)
        out = (torch.empty_like(x), *([torch.empty_like(bias)] if backward else []))

        def run() -> None:
            if backward:
                activation.gelu_bwd(grad, x, bias, "tanh", True, out=(out[0], out[1]))
            else:
                activation.gelu_fwd(x, bias, "tanh", out=out[0])

        names = ("grad_input", "grad_bias") if backward else ("out",)
        return _problem(
            lambda a, b: activation_reference.gelu(a, b, "tanh"), [x, bias], grad, backward, run, out, names
        )

    return problem


def _problem(
    definition: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    grad: Tensor,
    backward: bool,
    run: Callable[[], None],
    out: Sequence[Tensor],
    names: Sequence[str],
) -> Problem:
    def judged(*, double: bool) -> list[Tensor]:
        tensors = [t.double() if double else t for t in inputs]
        if not backward:
            return [definition(*tensors)]
        leaves = [t.detach().requires_grad_() for t in tensors]
        return gate.differentiated(definition, leaves, [grad.double() if double else grad])[1:]

    plain, exact = judged(double=False), judged(double=True)
    return Problem(lambda: poison(out), run, lambda: out, names, plain, exact)


TUNABLES = (
    Tunable("swiglu_fwd", gated_tiles, _gated("swiglu", False)),
    Tunable("swiglu_bwd", gated_tiles, _gated("swiglu", True)),
    Tunable("geglu_fwd", gated_tiles, _gated("geglu", False)),
    Tunable("geglu_bwd", gated_tiles, _gated("geglu", True)),
    Tunable("gelu_fwd", gated_tiles, _gelu(False)),
    Tunable("gelu_bwd", gated_tiles, _gelu(True)),
)

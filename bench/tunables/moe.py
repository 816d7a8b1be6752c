"""Tunable kernels of the mixture-of-experts operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from m4ov_bench import gate
from m4ov_bench.tunables.problem import Problem, Size, Tunable, poison, randn, warp_counts
from m4ov_kernels.gpu import Config
from m4ov_kernels.moe import reference
from m4ov_kernels.moe import triton as moe

Maker = Callable[[int, torch.dtype, torch.device, Size], Problem]
_EXPERTS, _TOP_K = 16, 2


def _tiles(*sizes: int) -> Callable[[int | None], Iterator[Config]]:
    def candidates(width: int | None) -> Iterator[Config]:
        for size in sizes:
            for columns in (width,) if width else (512, 1024, 256):
                if columns <= size:
                    for warps in warp_counts(size):
                        yield Config({"BLOCK_ROWS": size // columns, "BLOCK_D": columns}, warps)

    return candidates


def _tokens(width: int | None) -> Iterator[Config]:
    assert width is not None
    for size in (1024, 2048, 512, 4096):
        if width <= size or size == 1024:
            for warps in warp_counts(max(size, width)):
                yield Config({"BLOCK_T": max(1, size // width), "BLOCK_E": width}, warps)


def _products(_: int | None) -> Iterator[Config]:
    for high, wide, deep, warps, stages in (
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (64, 128, 64, 4, 4),
        (128, 256, 64, 8, 3),
        (64, 64, 32, 4, 2),
    ):
        yield Config({"BLOCK_M": high, "BLOCK_N": wide, "BLOCK_K": deep}, warps, stages)


def _problem(
    definition: Callable[..., Tensor],
    inputs: list[Tensor],
    towards: Tensor | None,
    run: Callable[[], None],
    out: tuple[Tensor, ...],
    which: int,
) -> Problem:
    """``which`` of output and gradients the kernel makes."""

    def judged(double: bool) -> list[Tensor]:
        leaves = [(x.double() if double else x).detach().requires_grad_(towards is not None) for x in inputs]
        grads = None if towards is None else [towards.double() if double else towards]
        return [gate.differentiated(definition, leaves, grads)[which]]

    return Problem(lambda: poison(list(out)), run, lambda: out, ("out",), judged(False), judged(True))


def _experts(tokens: int, device: torch.device) -> Tensor:
    return torch.rand(tokens, _EXPERTS, device=device).argsort(-1)[:, :_TOP_K].int()


def _rows(kind: str) -> Maker:
    def problem(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
        tokens = max(2, size.elements // width // _TOP_K)
        experts = _experts(tokens, device)
        x, grad = randn((tokens, width), dtype, device), randn((tokens, width), dtype, device)
        taken, order, offsets = reference.permute(x, experts, _EXPERTS)
        if kind == "permute":
            out = torch.empty_like(taken)
            rest = (torch.empty_like(order), torch.empty_like(offsets))
            run: Callable[[], object] = lambda: moe.permute_fwd(x, experts, _EXPERTS, out=(out, *rest))  # noqa: E731
            return _problem(lambda h: reference.permute(h, experts, _EXPERTS)[0], [x], None, run, (out,), 0)  # type: ignore[arg-type]
        weights = torch.rand(tokens, _TOP_K, device=device)
        none = x.new_empty(0)
        if kind == "fwd":
            out = torch.empty_like(x)
            run = lambda: moe.unpermute_fwd(taken, order, weights, out=out)  # noqa: E731
        elif kind == "bwd":
            out = torch.empty_like(taken)
            empty = weights.new_empty(0)
            run = lambda: moe.unpermute_bwd(grad, None, order, weights, True, False, out=(out, empty))  # noqa: E731
        else:
            out = torch.empty_like(weights)
            run = lambda: moe.unpermute_bwd(grad, taken, order, weights, False, True, out=(none, out))  # noqa: E731

        def definition(rows: Tensor, w: Tensor) -> Tensor:
            return reference.unpermute(rows, order, w)

        which = {"fwd": 0, "bwd": 1, "weights": 2}[kind]
        return _problem(definition, [taken, weights], grad, run, (out,), which)  # type: ignore[arg-type]

    return problem


def _route(backward: bool) -> Maker:
    def problem(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
        tokens, top_k = max(2, size.elements // width), min(8, width)
        logits, grad = randn((tokens, width), dtype, device), torch.randn(tokens, top_k, device=device)
        weights, experts, counts, probability = reference.route_topk(logits, top_k, True)
        out = torch.empty_like(logits if backward else weights)
        rest = tuple(map(torch.empty_like, (experts, counts, probability)))

        def run() -> None:
            if backward:
                moe.route_topk_bwd(logits, grad, None, weights, experts, True, out=out)
            else:
                moe.route_topk_fwd(logits, top_k, True, out=(out, *rest))  # type: ignore[arg-type]

        def definition(x: Tensor) -> Tensor:
            return reference.route_topk(x, top_k, True)[0]

        return _problem(definition, [logits], grad, run, (out,), int(backward))

    return problem


def _grouped(weight_gradient: bool) -> Maker:
    def problem(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
        width = min(width, 2048)
        tokens, columns = max(2, size.elements // width // _TOP_K), max(1, width * 3 // 4)
        offsets = reference.permute(torch.zeros(tokens, 1, device=device), _experts(tokens, device), _EXPERTS)[2]
        x, grad = (randn((tokens * _TOP_K, n), dtype, device) for n in (width, columns))
        weight = randn((_EXPERTS, columns, width), dtype, device)
        out = torch.empty_like(weight) if weight_gradient else torch.empty_like(grad)
        none = x.new_empty(0)

        def run() -> None:
            if weight_gradient:
                moe.grouped_linear_bwd(grad, x, weight, offsets, False, True, out=(none, out))
            else:
                moe.grouped_linear_fwd(x, weight, offsets, out=out)

        def definition(rows: Tensor, w: Tensor) -> Tensor:
            return reference.grouped_linear(rows, w, offsets)

        return _problem(definition, [x, weight], grad, run, (out,), 2 if weight_gradient else 0)

    return problem


TUNABLES = (
    Tunable("route_topk_fwd", _tokens, _route(False)),
    Tunable("route_topk_bwd", _tokens, _route(True)),
    Tunable("permute_fwd", _tiles(1024, 2048, 4096), _rows("permute")),
    Tunable("unpermute_fwd", _tiles(1024, 2048, 4096), _rows("fwd")),
    Tunable("unpermute_bwd", _tiles(1024, 2048, 4096), _rows("bwd")),
    Tunable("unpermute_weights", _tiles(1024, 512, 2048), _rows("weights")),
    Tunable("grouped_linear", _products, _grouped(False)),
    Tunable("grouped_linear_weight", _products, _grouped(True)),
)

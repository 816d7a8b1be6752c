"""Tunable kernels of the linears of quantised weights. A row's width is the group of four-bit codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from m4ov_bench.tunables.problem import Problem, Size, Tunable, blocks, poison, randn, tiles
from m4ov_kernels.gemm import reference
from m4ov_kernels.gemm import triton_linear_launches as launches
from m4ov_kernels.gemm.triton_linear_layout import layout_of
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight
from m4ov_kernels.gpu import Config

Make = Callable[[int, torch.dtype, torch.device, Size], Problem]


def _problem(kind: str, rows: int | None, activation: str) -> Make:
    """W4A16, W4A8, or fp8 in blocks; ``rows``: of the table's size, ``None``: many."""

    def problem(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
        K = min(4096, -(-size.wide // 128) * 128)
        columns = max(32, size.elements // K)
        x, full = randn((rows or max(80, columns // 2), K), dtype, device), randn((columns, K), dtype, device)
        weight: Int4Weight | Fp8Weight
        if kind == "int4":
            weight = Int4Weight.quantize(full, group_size=width if width < 128 else 128)
            layout = layout_of(weight.packed, weight.scales, weight.zeros, None, kind, K, weight.group_size)
        else:
            weight = Fp8Weight.quantize(full, granularity="block")
            layout = layout_of(weight.values.view(torch.uint8), weight.scales, None, None, kind, K, 128)
        out = torch.empty(x.shape[0], columns, dtype=dtype, device=device)

        def call() -> None:
            operand = launches.operand(x, layout, None, kind, activation)
            launches.forward(operand, layout, None, None, out, kind, activation, "none")

        def judged(wide: torch.dtype) -> list[Tensor]:
            return [reference.quantized_linear(x.to(wide), weight, None, None, activation, "none")]

        return Problem(lambda: poison([out]), call, lambda: (out,), ("output",), judged(dtype), judged(torch.float64))

    return problem


def _shapes(*shapes: tuple[int, int, int, int, int]) -> Callable[[int | None], Iterator[Config]]:
    """Weights, tokens and features of K in a tile, warps, stages; features of K at most the group."""

    def candidates(group: int | None) -> Iterator[Config]:
        for weights, tokens, features, warps, stages in shapes:
            sizes = {"BLOCK_N": weights, "BLOCK_M": tokens, "BLOCK_K": min(features, group or 128), "GROUP": 8}
            yield Config(sizes, warps, stages)

    return candidates


def _parts(_: int | None) -> Iterator[Config]:
    """Weights, tokens, parts, warps, stages."""
    for weights, tokens, parts, warps, stages in _TMA:
        for group in (8, 16):
            sizes = {"BLOCK_N": weights, "BLOCK_M": tokens, "BLOCK_K": 128, "PARTS": parts, "GROUP": group}
            yield Config(sizes, warps, stages)


def _dequantize(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
    K = min(4096, -(-size.wide // 128) * 128)
    weight = Int4Weight.quantize(randn((max(32, size.elements // K), K), dtype, device), group_size=128)
    out = torch.empty(*weight.shape, dtype=dtype, device=device)
    given = (weight.packed, weight.scales, weight.zeros, None, "int4", 128)
    return Problem(
        lambda: poison([out]),
        lambda: launches.dequantized(*given, out, 0),
        lambda: (out,),
        ("weight",),
        [weight.dequantize(dtype)],
        [weight.dequantize(torch.float64)],
    )


_FEW = ((64, 16, 128, 4, 4), (128, 16, 128, 4, 4), (64, 16, 128, 4, 6), (128, 16, 128, 8, 3))
_SOME = ((64, 64, 128, 4, 4), (128, 64, 128, 4, 3), (128, 64, 128, 8, 4))
_LOTS = ((128, 128, 128, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (64, 128, 128, 4, 4))
_BYTES = ((128, 128, 128, 8, 3), (64, 128, 128, 4, 4), (128, 128, 128, 8, 2))
_TMA = ((64, 128, 4, 8, 3), (64, 128, 2, 8, 4), (128, 128, 2, 8, 3), (64, 256, 2, 8, 3), (64, 64, 4, 4, 4))
TUNABLES = (
    Tunable("quantized_linear_int4_few", _shapes(*_FEW), _problem("int4", 16, "bf16")),
    Tunable("quantized_linear_int4_some", _shapes(*_SOME), _problem("int4", 64, "bf16")),
    Tunable("quantized_linear_int4_many", _shapes(*_LOTS), _problem("int4", None, "bf16")),
    Tunable("quantized_linear_int4_many_codes", _shapes(*_LOTS), _problem("int4", None, "fp8")),
    Tunable("quantized_linear_bytes_few", _shapes(*_FEW), _problem("fp8", 16, "fp8")),
    Tunable("quantized_linear_bytes_some", _shapes(*_SOME), _problem("fp8", 64, "fp8")),
    Tunable("quantized_linear_bytes_many", _shapes(*_BYTES), _problem("fp8", None, "fp8")),
    Tunable("quantized_linear_bytes_many_descriptors", _parts, _problem("fp8", None, "fp8")),
    Tunable("quantized_linear_input", blocks("BLOCK_D", 1024, 2048, 4096), _problem("fp8", 64, "fp8")),
    Tunable(
        "quantized_linear_merge",
        tiles("BLOCK_ROWS", "BLOCK_D", (1, 512), (1, 1024), (2, 512), (4, 256)),
        _problem("int4", 16, "bf16"),
    ),
    Tunable(
        "quantized_linear_dequantize",
        tiles("BLOCK_ROWS", "BLOCK_D", (8, 256), (4, 512), (16, 128), (8, 512)),
        _dequantize,
    ),
)

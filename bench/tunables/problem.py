"""What a tunable kernel declares: candidate configurations, and a problem to judge and measure them by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m4ov_kernels.gpu import Config


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


def warp_counts(elements: int) -> Iterator[int]:
    """Warps that leave each thread of a block of so many elements between 4 and 64 of them."""
    return (warps for warps in (1, 2, 4, 8, 16, 32) if 4 <= elements / (32 * warps) <= 64)


def whole_rows(width: int | None) -> Iterator[Config]:
    assert width is not None
    for tile in (1024, 2048, 4096, 512, 8192):
        if tile >= width or tile == 1024:
            rows = max(1, tile // width)
            for warps in warp_counts(rows * width):
                yield Config({"BLOCK_ROWS": rows, "BLOCK_D": width}, warps)


def blocks(name: str, *sizes: int) -> Callable[[int | None], Iterator[Config]]:
    def candidates(width: int | None) -> Iterator[Config]:
        for size in sizes:
            for warps in warp_counts(size):
                yield Config({name: size}, warps)

    return candidates


def tiles(first: str, second: str, *shapes: tuple[int, int]) -> Callable[[int | None], Iterator[Config]]:
    def candidates(width: int | None) -> Iterator[Config]:
        for rows, columns in shapes:
            for warps in warp_counts(rows * columns):
                yield Config({first: rows, second: columns}, warps)

    return candidates


def randn(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def poison(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.fill_(float("nan"))

"""The bounds of sequences: cumulative lengths, checked where their values are on the host."""

from __future__ import annotations

from itertools import pairwise
from typing import NoReturn

from torch import Tensor


def check_bounds(operator: str, argument: str, cu_seqlens: Tensor, tokens: int) -> list[int]:
    """The values of ``cu_seqlens``; ``ValueError``, with the position, unless they start at 0, never fall and end at
    ``tokens``. Waits for the device if they are on one."""
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0:
        _refuse(operator, argument, 0, bounds, "0")
    if sorted(bounds) != bounds:
        position = next(i for i, (start, end) in enumerate(pairwise(bounds), 1) if end < start)
        _refuse(operator, argument, position, bounds, f"{bounds[position - 1]} or greater, as the bounds before it")
    if bounds[-1] != tokens:
        _refuse(operator, argument, len(bounds) - 1, bounds, f"{tokens}, the number of tokens")
    return bounds


def _refuse(operator: str, argument: str, position: int, bounds: list[int], expected: str) -> NoReturn:
    raise ValueError(f"{operator}: {argument}[{position}] is {bounds[position]}: expected {expected}")

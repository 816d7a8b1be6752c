"""The bounds of sequences: cumulative lengths, checked where their values are on the host."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from m4ov_kernels import checks

OPERATOR = "varlen_attention"


def check_bounds(argument: str, cu_seqlens: Tensor, tokens: int) -> list[int]:
    """The values of ``cu_seqlens``; ``ValueError``, with the position, unless they start at 0, never fall and end at
    ``tokens``. Waits for the device if they are on one."""
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0:
        checks.refuse(ValueError, OPERATOR, f"{argument}[0]", "0", bounds[0])
    if bounds[-1] != tokens:
        checks.refuse(ValueError, OPERATOR, f"{argument}[-1]", f"{tokens}, the number of tokens", bounds[-1])
    if sorted(bounds) != bounds:
        position = next(i for i, (start, end) in enumerate(pairwise(bounds), 1) if end < start)
        expected = f"{bounds[position - 1]} or greater, as the bounds before it"
        checks.refuse(ValueError, OPERATOR, f"{argument}[{position}]", expected, bounds[position])
    return bounds

"""What turns positions into angles: the inverse frequencies, and which position each of them multiplies.

Tables of a few hundred bytes, made once for each (theta, width, sections, device) and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def inverse_frequencies(theta: float, width: int, dtype: torch.dtype) -> Tensor:
    """``theta^(-2i / width)`` for i below ``width / 2``, on the CPU; float32 has the bits of Hugging Face's."""
    exponent = torch.arange(0, width, 2, dtype=dtype, device="cpu") / width
    frequencies: Tensor = 1.0 / (theta**exponent)
    return frequencies


def axes(half: int, sections: Sequence[int] | None, interleaved: bool) -> list[int]:
    """Which position (0: t, 1: h, 2: w) the i-th frequency multiplies.

    Qwen2.5-VL takes sections one after the other; Qwen3-VL gives every third frequency to h, and every third to w, as
    far as their sections reach.
    """
    if not sections:
        return [0] * half
    if interleaved:
        return [i % 3 if i < 3 * sections[i % 3] else 0 for i in range(half)]
    return [axis for axis, count in enumerate(sections) for _ in range(count)]


class Tables(NamedTuple):
    """The inverse frequencies: ``single``: as float32 has them; ``widened``: the same in float64; ``double``: as
    float64 has them; ``exact``: as fractions of a turn, int64 in units of 2^-64, so that a wrapping product with a
    position is the angle. ``axis``: int32. Each ``[half]``."""

    single: Tensor
    widened: Tensor
    double: Tensor
    exact: Tensor
    axis: Tensor


@lru_cache(maxsize=64)
def tables(theta: float, width: int, sections: tuple[int, ...], interleaved: bool, device: torch.device) -> Tables:
    """Of one rotation: all ``width / 2`` frequencies, each with its position."""
    axis = torch.tensor(axes(width // 2, sections, interleaved), dtype=torch.int32)
    return _made(theta, width, 1, axis, device)


@lru_cache(maxsize=64)
def axial_tables(theta: float, dim: int, device: torch.device) -> Tables:
    """Of a two-dimensional rotation of heads of ``dim``: the frequencies of ``dim / 2`` for rows, again for columns."""
    axis = torch.arange(2, dtype=torch.int32).repeat_interleave(dim // 4)
    return _made(theta, dim // 2, 2, axis, device)


def _made(theta: float, width: int, repeats: int, axis: Tensor, device: torch.device) -> Tables:
    single = inverse_frequencies(theta, width, torch.float32)
    double = inverse_frequencies(theta, width, torch.float64)
    exact = torch.tensor([_turns(theta, i, width) for i in range(width // 2)], dtype=torch.int64)
    made = (table.repeat(repeats) for table in (single, single.double(), double, exact))
    return Tables(*(table.to(device) for table in (*made, axis)))


def _turns(theta: float, i: int, width: int) -> int:
    """``theta^(-2i / width) / 2π`` modulo 1, in units of 2^-64, as a signed 64-bit integer."""
    with localcontext(prec=60):
        turns = Decimal(theta) ** (Decimal(-2 * i) / width) / (2 * _PI)
        whole = int((turns * 2**64).to_integral_value()) % 2**64
    return whole - 2**64 if whole >= 2**63 else whole

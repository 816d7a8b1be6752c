"""How a call's shapes, dtypes, strides and values are chosen: once, for hypothesis and for a plain seed alike.

A declaration takes a :class:`Draw` and asks it for integers. :class:`Seeded` answers from a seed, for a million calls;
``strategies.drawn`` answers from hypothesis, which shrinks a failure (so the plainest choice always stands first).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMERICS = ("hf", "vllm", "fp32")
LAYOUTS = ("contiguous", "wide rows", "offset", "transposed", "every other", "broadcast", "overlapping")
# "normal" to "large" may be judged by the size of an error; the others are the values at which formats end.
VALUES = ("normal", "small", "large", "equal", "zeros", "denormal", "wide", "huge", "special")
# Of gradients: intermediate sums near the end of the format would overflow in one order and not in another.
GRADIENT_VALUES = ("normal", "small", "large", "equal", "zeros", "denormal", "wide", "nonfinite")
# Around every vector width and block size, and a few that are no multiple of anything.
WIDE = (127, 128, 129, 255, 257, 512, 1000, 1023, 2049, 4304)
ROWS = (16, 17, 63, 65, 130)


class Draw:
    """A source of choices; :meth:`integer` is all that a subclass defines."""

    def integer(self, low: int, high: int) -> int:
        """From ``low`` to ``high``, both included."""
        raise NotImplementedError

    def choice(self, options: Sequence[T]) -> T:
        return options[self.integer(0, len(options) - 1)]

    def one_in(self, count: int) -> bool:
        return self.integer(0, count - 1) == count - 1

    def boolean(self) -> bool:
        return self.integer(0, 1) == 1


class Seeded(Draw):
    def __init__(self, *seed: int) -> None:
        self._random = random.Random(":".join(map(str, seed))).random

    def integer(self, low: int, high: int) -> int:
        return low + int(self._random() * (high - low + 1))


class Drawn(Draw):
    """From hypothesis: ``integer(low, high)`` is a draw."""

    def __init__(self, integer: Callable[[int, int], int]) -> None:
        self.integer = integer  # type: ignore[method-assign]


def shape(draw: Draw) -> tuple[int, ...]:
    """``[..., D]``: 1 to 5 dimensions, 0 rows, 1 element, odd and wide rows, and now and then enough for threads to
    share (64 KiB), seldom enough to be written past the caches (16 MiB)."""
    if draw.one_in(128):
        if draw.one_in(32):
            return draw.choice(((130, 32771), (2051, 2053), (4, 1 << 20)))
        return draw.choice(((130, 257), (9, 4304), (3, 2, 8203), (1, 20011), (2050, 16), (4097, 5)))
    width = draw.integer(1, 80) if not draw.one_in(8) else draw.choice(WIDE)
    dimensions = draw.integer(1, 5)
    if dimensions == 1:
        return (width,)
    if dimensions == 2:
        return (draw.integer(0, 9) if not draw.one_in(6) else draw.choice(ROWS), width)
    return (*(draw.integer(0 if draw.one_in(8) else 1, 3) for _ in range(dimensions - 1)), width)


def kinds(draw: Draw, values: Sequence[str] = VALUES) -> Callable[[], str]:
    """What values the tensors of one call hold: half of the calls only normal ones, so that all results are judged."""
    return (lambda: draw.choice(values)) if draw.boolean() else (lambda: "normal")


def tensor(
    draw: Draw, shape: Sequence[int], dtype: torch.dtype, kind: str = "normal", scale: float = 1.0, layout: str = ""
) -> Tensor:
    """Random values of a kind, in a drawn (or the given) memory layout."""
    count, pool = math.prod(shape), _pool()
    if count > pool.numel() // 2:
        normal = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(draw.integer(0, 2**32 - 1)))
    else:
        first = draw.integer(0, pool.numel() - count)
        normal = pool[first : first + count].view(tuple(shape))
    values = _VALUES[kind](normal, dtype, draw)
    if scale != 1.0:
        values = values * scale
    return laid_out(values.to(dtype, copy=True), layout or layout_of(draw))


@cache
def _pool() -> Tensor:
    """Normal values to cut tensors from: much faster than a generator for each."""
    return torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))


def layout_of(draw: Draw) -> str:
    return draw.choice(LAYOUTS) if draw.one_in(2) else "contiguous"


def _special(normal: Tensor, dtype: torch.dtype, draw: Draw) -> Tensor:
    """Mostly normal values, with a few of those that formats end with."""
    info = torch.finfo(torch.float32 if dtype is torch.float64 else dtype)
    return _sprinkled(
        normal, draw, *_NONFINITE, info.max, info.min, info.smallest_normal, info.smallest_normal / 3, -0.0
    )


def _sprinkled(normal: Tensor, draw: Draw, *ends: float) -> Tensor:
    normal = normal.clone()
    for _ in range(draw.integer(1, 4)):
        if normal.numel():
            normal.view(-1)[draw.integer(0, normal.numel() - 1)] = draw.choice(ends)
    return normal


def _wide(normal: Tensor, dtype: torch.dtype, draw: Draw) -> Tensor:
    """Magnitudes evenly over the exponents of the dtype, but for the last few of float32's, which sums need."""
    info = torch.finfo(dtype)
    low, high = max(math.log2(info.smallest_normal), -126.0), min(math.log2(info.max), 100.0)
    exponents = (normal * 7.3).frac().abs() * (high - low - 0.1) + low
    return torch.exp2(exponents) * normal.sign()


_NONFINITE = (torch.nan, torch.inf, -torch.inf)
_VALUES: dict[str, Callable[[Tensor, torch.dtype, Draw], Tensor]] = {
    "normal": lambda normal, *_: normal,
    "small": lambda normal, *_: normal * 1e-4,
    "large": lambda normal, dtype, draw: normal * draw.choice((30.0, 2000.0)),
    "equal": lambda normal, dtype, draw: torch.full_like(normal, draw.choice((1.0, -3.0, 0.1, 100.0))),
    "zeros": lambda normal, dtype, draw: torch.full_like(normal, draw.choice((0.0, -0.0))),
    "denormal": lambda normal, dtype, *_: normal.double() * (torch.finfo(dtype).smallest_normal / 4),
    "wide": _wide,
    "huge": lambda normal, dtype, *_: normal.double().clamp(-2, 2) * (torch.finfo(dtype).max / 2),
    "special": _special,
    "nonfinite": lambda normal, dtype, draw: _sprinkled(normal, draw, *_NONFINITE),
}


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values: in rows of a wider buffer, one element off alignment, with leading dimensions swapped in
    memory, or with a gap between elements. "broadcast": the first row stands for all of them, which share its memory.
    "overlapping": so do a row and the next, but for one element."""
    shape = values.shape
    if not shape:
        return values
    if layout == "wide rows":
        out = values.new_empty((*shape[:-1], shape[-1] + 3))[..., 1 : shape[-1] + 1]
    elif layout == "offset":
        out = values.new_empty(values.numel() + 1)[1:].view(shape)
    elif layout == "transposed" and values.ndim > 1:
        out = values.new_empty((shape[1], shape[0], *shape[2:])).transpose(0, 1)
    elif layout == "every other":
        out = values.new_empty((*shape, 2))[..., 0]
    elif layout == "broadcast" and values.numel():
        return values.reshape(-1, shape[-1])[0].clone().expand(shape)
    elif layout == "overlapping" and values.ndim == 2 and values.numel():
        return values.reshape(-1)[: sum(shape) - 1].clone().unfold(0, shape[1], 1)
    else:
        return values
    return out.copy_(values)


def describe(value: Any) -> str:
    """A value for a report: a tensor by dtype, shape, strides and offset."""
    if not isinstance(value, Tensor):
        return repr(value)
    dtype = str(value.dtype).removeprefix("torch.")
    if value.layout is not torch.strided:
        return f"{dtype}{list(value.shape)} {value.layout}"
    return f"{dtype}{list(value.shape)} strides {list(value.stride())} offset {value.storage_offset()}"

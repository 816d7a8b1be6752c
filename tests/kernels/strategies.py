"""Hypothesis strategies that every operator's tests draw from: shapes, dtypes, magnitudes, memory layouts, and whole
calls as ``operators`` declares them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from .draws import DTYPES, LAYOUTS, NUMERICS, ROWS, WIDE, Draw, Drawn, laid_out

T = TypeVar("T")

HALF_AND_SINGLE = DTYPES
dtypes = st.sampled_from(DTYPES)
numerics = st.sampled_from(NUMERICS)
widths = st.one_of(st.integers(1, 80), st.sampled_from(WIDE))
rows = st.one_of(st.integers(0, 9), st.sampled_from(ROWS))
magnitudes = st.sampled_from((1.0, 1.0, 1e-4, 30.0, 2000.0))
layouts = st.sampled_from(LAYOUTS)


def shapes(width: st.SearchStrategy[int] = widths) -> st.SearchStrategy[tuple[int, ...]]:
    return st.one_of(
        width.map(lambda n: (n,)),
        st.tuples(rows, width),
        st.tuples(st.integers(0, 3), st.integers(1, 7), width),
    )


def drawn(declaration: Callable[[Draw], T]) -> st.SearchStrategy[T]:
    """What a declaration makes of a :class:`Draw`, as a strategy."""

    @st.composite
    def strategy(draw: st.DrawFn) -> T:
        return declaration(Drawn(lambda low, high: draw(st.integers(low, high))))

    return strategy()


def tensor(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", magnitude: float = 1.0) -> Tensor:
    """A random normal tensor of the given shape, laid out in memory as named."""
    values = torch.randn(shape) * magnitude
    return laid_out(values.to(dtype), layout)

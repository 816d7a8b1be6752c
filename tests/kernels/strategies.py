"""Hypothesis strategies that every operator's tests draw from: shapes, dtypes, magnitudes, memory layouts."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
dtypes = st.sampled_from(HALF_AND_SINGLE)
numerics = st.sampled_from(("hf", "vllm", "fp32"))
# Widths around every vector width and block size, and a few that are no multiple of anything.
widths = st.one_of(st.integers(1, 80), st.sampled_from((127, 128, 129, 255, 257, 512, 1000, 1023, 2049, 4304)))
rows = st.one_of(st.integers(0, 9), st.sampled_from((16, 17, 63, 65, 130)))
magnitudes = st.sampled_from((1.0, 1.0, 1e-4, 30.0, 2000.0))
layouts = st.sampled_from(("contiguous", "wide rows", "offset", "transposed", "every other"))


def shapes(width: st.SearchStrategy[int] = widths) -> st.SearchStrategy[tuple[int, ...]]:
    return st.one_of(
        width.map(lambda n: (n,)),
        st.tuples(rows, width),
        st.tuples(st.integers(0, 3), st.integers(1, 7), width),
    )


def tensor(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", magnitude: float = 1.0) -> Tensor:
    """A random normal tensor of the given shape, laid out in memory as named."""
    values = torch.randn(shape) * magnitude
    return laid_out(values.to(dtype), layout)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values: in rows of a wider buffer, one element off alignment, with leading dimensions swapped in
    memory, or with a gap between elements."""
    shape = values.shape
    if layout == "wide rows":
        out = values.new_empty((*shape[:-1], shape[-1] + 3))[..., 1 : shape[-1] + 1]
    elif layout == "offset":
        out = values.new_empty(values.numel() + 1)[1:].view(shape)
    elif layout == "transposed" and values.ndim > 1:
        out = values.new_empty((shape[1], shape[0], *shape[2:])).transpose(0, 1)
    elif layout == "every other":
        out = values.new_empty((*shape, 2))[..., 0]
    else:
        return values
    return out.copy_(values)

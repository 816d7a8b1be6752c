"""What every raw implementation shares, compiled or Triton: option codes, rows of any layout, preallocated outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NUMERICS = {"hf": 0, "vllm": 1, "fp32": 2}
_CACHE_LINE = 64
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/common/types.h numbers them


def as_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """``tensor`` ``[..., D]`` and the distance of its rows in elements, or a contiguous copy where its last dimension
    is not dense or its rows are not evenly spaced."""
    width = tensor.shape[-1]
    if tensor.is_contiguous():
        return tensor, width
    if width > 1 and tensor.stride(-1) != 1:
        return tensor.contiguous(), width
    distance = spacing(tensor.shape[:-1], tensor.stride()[:-1], width)
    return (tensor.contiguous(), width) if distance is None else (tensor, distance)


def as_heads(tensor: Tensor) -> tuple[Tensor, int, int]:
    """``tensor`` ``[..., H, D]`` and the distances of its tokens and of its heads in elements, or a contiguous copy
    where its last dimension is not dense or its tokens are not evenly spaced."""
    heads, width = tensor.shape[-2:]
    distance = None
    if width == 1 or tensor.stride(-1) == 1:
        distance = spacing(tensor.shape[:-2], tensor.stride()[:-2], heads * width)
    if distance is None:
        return tensor.contiguous(), heads * width, width
    return tensor, distance, tensor.stride(-2)


def spacing(shape: Sequence[int], strides: Sequence[int], alone: int) -> int | None:
    """The distance between the neighbours of all elements of such dimensions in their order; ``None``: it varies;
    ``alone``: there is one element."""
    distance, span = None, 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if distance is None:
            distance = stride
        elif stride != distance * span:
            return None
        span *= size
    return alone if distance is None else distance


def output(given: Tensor | None, shape: tuple[int, ...] | torch.Size, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A fresh contiguous tensor, or the preallocated one that a raw function was given, checked."""
    if given is None:
        return torch.empty(shape, dtype=dtype, device=like.device)
    if given.shape != shape or given.dtype != dtype or given.device != like.device or not given.is_contiguous():
        raise ValueError(f"out: expected a contiguous {dtype} tensor {list(shape)} on {like.device}")
    return given


def scratch(size: int) -> tuple[Tensor, int]:
    """Memory for a compiled CPU kernel, to be held until that returns, and the address of its first cache line."""
    memory = torch.empty(size + _CACHE_LINE, dtype=torch.uint8)
    return memory, -(-memory.data_ptr() // _CACHE_LINE) * _CACHE_LINE


def vector(given: Tensor | None, like: Tensor, missing: float) -> Tensor:
    """``[D]``, contiguous; full of ``missing`` where none was given."""
    return like.new_full((like.shape[-1],), missing) if given is None else given.contiguous()


# Gradients of a vector that all rows share are summed in order within a block of rows, then over blocks in order.
# Enough blocks for many cores, few enough that the partial sums stay small beside the tensors; a function of the number
# of rows only.
_BLOCK_ROWS, _MAX_BLOCKS = 32, 64
_PARTIAL_ALIGN = 32  # as csrc/common/types.h has it


def row_blocks(rows: int) -> int:
    """How many partial sums the compiled CPU kernels make."""
    return min(_MAX_BLOCKS, (rows + _BLOCK_ROWS - 1) // _BLOCK_ROWS)


def padded(columns: int) -> int:
    """The length of one partial sum in scratch."""
    return (columns + _PARTIAL_ALIGN - 1) // _PARTIAL_ALIGN * _PARTIAL_ALIGN

"""What every raw implementation shares, compiled or Triton: option codes, rows of any layout, preallocated outputs."""

from __future__ import annotations

import torch
from torch import Tensor

NUMERICS = {"hf": 0, "vllm": 1, "fp32": 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/common/types.h numbers them


def as_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """``tensor`` ``[..., D]`` and the distance of its rows in elements, or a contiguous copy where its last dimension
    is not dense or its rows are not evenly spaced."""
    width = tensor.shape[-1]
    if tensor.is_contiguous():
        return tensor, width
    if width > 1 and tensor.stride(-1) != 1:
        return tensor.contiguous(), width
    distance, span = None, 1
    for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if distance is None:
            distance = stride
        elif stride != distance * span:
            return tensor.contiguous(), width
        span *= size
    return tensor, width if distance is None else distance


def output(given: Tensor | None, shape: tuple[int, ...] | torch.Size, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A fresh contiguous tensor, or the preallocated one that a raw function was given, checked."""
    if given is None:
        return torch.empty(shape, dtype=dtype, device=like.device)
    if given.shape != shape or given.dtype != dtype or given.device != like.device or not given.is_contiguous():
        raise ValueError(f"out: expected a contiguous {dtype} tensor {list(shape)} on {like.device}")
    return given

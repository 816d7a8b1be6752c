"""The definition of the quantisations, in plain PyTorch: in float32 whatever the dtype, and not differentiable."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from m4ov_kernels.activation import reference as activation
from m4ov_kernels.norm import reference as norm

BLOCK = 128
LEAST_SCALE = 2.0**-126  # the smallest normal float32, so that a processor that flushes subnormals divides by no zero
LARGEST = {"int8": 127.0, "fp8": 448.0}
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def quantize_int8(input: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`m4ov_kernels.quantize_int8`."""
    return _rows(input, "int8")


def quantize_fp8(input: Tensor, granularity: str, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`m4ov_kernels.quantize_fp8`; the third result is empty unless ``transposed``."""
    values, scales = {"row": _rows, "group": _groups, "block": _blocks}[granularity](input, "fp8")
    if not transposed:
        return values, scales, values.new_empty(0)
    bytes = values.view(torch.uint8).reshape(-1, input.shape[-1])
    return values, scales, bytes.t().contiguous().view(values.dtype)


def rms_norm_quantize(
    hidden_states: Tensor, weight: Tensor, residual: Tensor | None, eps: float, numerics: str, dtype: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`m4ov_kernels.rms_norm_quantize`; also the sum (without residual: the input)."""
    normed, total = norm.rms_norm(hidden_states, weight, eps, residual, numerics)
    return *_rows(normed, dtype), total


def swiglu_quantize(gate: Tensor, up: Tensor, numerics: str, dtype: str) -> tuple[Tensor, Tensor]:
    """See :func:`m4ov_kernels.swiglu_quantize`."""
    return _rows(activation.swiglu(gate, up, numerics), dtype)


def _rows(input: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    wide = input.to(torch.float32)
    scales = _scales(wide.abs().amax(-1, keepdim=True), dtype)
    return _codes(wide, scales, dtype), scales


def _groups(input: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    wide, width = input.to(torch.float32), input.shape[-1]
    grouped = F.pad(wide, (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    scales = _scales(grouped.abs().amax(-1), dtype)
    return _codes(wide, scales.repeat_interleave(BLOCK, -1)[..., :width], dtype), scales


def _blocks(input: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    width = input.shape[-1]
    wide = input.to(torch.float32).reshape(-1, width)
    rows = wide.shape[0]
    blocks = F.pad(wide, (0, -width % BLOCK, 0, -rows % BLOCK)).unflatten(0, (-1, BLOCK)).unflatten(-1, (-1, BLOCK))
    scales = _scales(blocks.abs().amax((1, 3)), dtype)
    of_each = scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :width]
    return _codes(wide, of_each, dtype).view(input.shape), scales


def _scales(largest: Tensor, dtype: str) -> Tensor:
    scales = (largest / LARGEST[dtype]).clamp_min(LEAST_SCALE)
    return torch.where(largest.isfinite(), scales, torch.nan)


def _codes(wide: Tensor, scales: Tensor, dtype: str) -> Tensor:
    scaled = torch.where(scales.isnan(), 0.0, wide / scales).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (scaled.round() if dtype == "int8" else scaled).to(CODES[dtype])

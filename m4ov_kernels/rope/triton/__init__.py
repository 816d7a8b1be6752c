"""The operators in Triton, for CUDA and ROCm (and, interpreted, for CPU tensors); a file for each."""

from __future__ import annotations

from m4ov_kernels.rope.triton import positions
from m4ov_kernels.rope.triton.positions import mrope_positions_fwd

__all__ = ["KERNELS", "mrope_positions_fwd"]

KERNELS = [*positions.KERNELS]

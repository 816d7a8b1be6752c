"""The operators in Triton, for CUDA and ROCm (and, interpreted, for CPU tensors); a file for each."""

from __future__ import annotations

from m4ov_kernels.rope.triton import positions
from m4ov_kernels.rope.triton import qk_norm_mrope as _qk_norm_mrope
from m4ov_kernels.rope.triton.positions import mrope_positions_fwd
from m4ov_kernels.rope.triton.qk_norm_mrope import qk_norm_mrope_bwd, qk_norm_mrope_fwd

__all__ = ["KERNELS", "mrope_positions_fwd", "qk_norm_mrope_bwd", "qk_norm_mrope_fwd"]

KERNELS = [*positions.KERNELS, *_qk_norm_mrope.KERNELS]

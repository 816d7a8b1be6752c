"""The operators through the compiled kernels (CPU); a file for each."""

from __future__ import annotations

from m4ov_kernels.rope.native.positions import mrope_positions_fwd
from m4ov_kernels.rope.native.qk_norm_mrope import qk_norm_mrope_bwd, qk_norm_mrope_fwd

__all__ = ["mrope_positions_fwd", "qk_norm_mrope_bwd", "qk_norm_mrope_fwd"]

"""The definitions, in plain PyTorch; a file for each operator."""

from __future__ import annotations

from m4ov_kernels.rope.reference.positions import mrope_positions
from m4ov_kernels.rope.reference.qk_norm_mrope import qk_norm_mrope

__all__ = ["mrope_positions", "qk_norm_mrope"]

"""Rotary positions of vision-language models: ``mrope_positions`` and ``qk_norm_mrope``."""

from __future__ import annotations

from m4ov_kernels.rope.positions import mrope_positions
from m4ov_kernels.rope.qk_norm_mrope import QK_NORM_MROPE, qk_norm_mrope

__all__ = ["QK_NORM_MROPE", "mrope_positions", "qk_norm_mrope"]

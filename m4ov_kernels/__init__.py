"""Operators of vision-language models, fast and exact on any machine, and the patches that put them into models."""

from __future__ import annotations

from m4ov_kernels.activation import swiglu
from m4ov_kernels.attention import varlen_attention
from m4ov_kernels.device_errors import check
from m4ov_kernels.dispatch import backend
from m4ov_kernels.head import linear_cross_entropy
from m4ov_kernels.norm import rms_norm
from m4ov_kernels.patches import patch, unpatch
from m4ov_kernels.vision import pack_patches

__all__ = [
    "backend",
    "check",
    "linear_cross_entropy",
    "pack_patches",
    "patch",
    "rms_norm",
    "swiglu",
    "unpatch",
    "varlen_attention",
]

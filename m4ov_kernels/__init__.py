"""Operators of vision-language models, fast and exact on any machine, and the patches that put them into models."""

from __future__ import annotations

from m4ov_kernels.activation import geglu, gelu, gelu_tanh, swiglu
from m4ov_kernels.attention import varlen_attention
from m4ov_kernels.device_errors import check
from m4ov_kernels.dispatch import backend
from m4ov_kernels.head import linear_cross_entropy
from m4ov_kernels.norm import layer_norm, rms_norm
from m4ov_kernels.patches import patch, unpatch

__all__ = [
    "backend",
    "check",
    "geglu",
    "gelu",
    "gelu_tanh",
    "layer_norm",
    "linear_cross_entropy",
    "patch",
    "rms_norm",
    "swiglu",
    "unpatch",
    "varlen_attention",
]

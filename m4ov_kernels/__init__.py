"""Operators of vision-language models, fast and exact on any machine, and the patches that put them into models."""

from __future__ import annotations

from m4ov_kernels.activation import geglu, gelu, gelu_tanh, swiglu
from m4ov_kernels.attention import varlen_attention
from m4ov_kernels.device_errors import check
from m4ov_kernels.dispatch import backend
from m4ov_kernels.gemm import (
    fp8_linear,
    int4_linear,
    int8_linear,
    invariant_linear,
    quantize_fp8,
    quantize_int8,
    requantize,
    rms_norm_quantize,
    swiglu_quantize,
)
from m4ov_kernels.head import linear_cross_entropy, linear_kl, linear_logprob
from m4ov_kernels.invariance import invariant
from m4ov_kernels.moe import grouped_linear, permute, route_topk, unpermute
from m4ov_kernels.norm import layer_norm, rms_norm
from m4ov_kernels.packing import PackedBatch, pack_sequences
from m4ov_kernels.patches import patch, unpatch
from m4ov_kernels.rope import mrope_positions, qk_norm_mrope
from m4ov_kernels.vision import (
    deepstack_add,
    interpolate_position_embeddings,
    pack_patches,
    patch_embed,
    scatter_vision,
    vision_positions,
    vision_rope,
)

__all__ = [
    "PackedBatch",
    "backend",
    "check",
    "deepstack_add",
    "fp8_linear",
    "geglu",
    "gelu",
    "gelu_tanh",
    "grouped_linear",
    "int4_linear",
    "int8_linear",
    "interpolate_position_embeddings",
    "invariant",
    "invariant_linear",
    "layer_norm",
    "linear_cross_entropy",
    "linear_kl",
    "linear_logprob",
    "mrope_positions",
    "pack_patches",
    "pack_sequences",
    "patch",
    "patch_embed",
    "permute",
    "qk_norm_mrope",
    "quantize_fp8",
    "quantize_int8",
    "requantize",
    "rms_norm",
    "rms_norm_quantize",
    "route_topk",
    "scatter_vision",
    "swiglu",
    "swiglu_quantize",
    "unpatch",
    "unpermute",
    "varlen_attention",
    "vision_positions",
    "vision_rope",
]

"""Modules over the operators. The patches put them into Hugging Face models; our own models are built from them."""

from __future__ import annotations

from m4ov_kernels.nn.attention import PatchOrder, Rotation, TextAttention, VisionAttention
from m4ov_kernels.nn.loss import CausalLMHead, causal_lm_loss
from m4ov_kernels.nn.merger import PatchMerger
from m4ov_kernels.nn.mlp import GELU, SwiGLUMLP, VisionMLP, linear_gelu
from m4ov_kernels.nn.moe import MoE, MoEExperts, MoERouter, load_balancing_loss
from m4ov_kernels.nn.norm import LayerNorm, RMSNorm
from m4ov_kernels.nn.patch_embed import PatchEmbed
from m4ov_kernels.nn.position_embedding import PositionEmbedding
from m4ov_kernels.nn.quantized import Fp8Linear, Int4Linear, Int8Linear

__all__ = [
    "GELU",
    "CausalLMHead",
    "Fp8Linear",
    "Int4Linear",
    "Int8Linear",
    "LayerNorm",
    "MoE",
    "MoEExperts",
    "MoERouter",
    "PatchEmbed",
    "PatchMerger",
    "PatchOrder",
    "PositionEmbedding",
    "RMSNorm",
    "Rotation",
    "SwiGLUMLP",
    "TextAttention",
    "VisionAttention",
    "VisionMLP",
    "causal_lm_loss",
    "linear_gelu",
    "load_balancing_loss",
]

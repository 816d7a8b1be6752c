"""Qwen3-VL with a mixture of experts, as transformers has it."""

from __future__ import annotations

from torch import nn
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as hf

from m4ov_kernels.nn import LayerNorm, PatchEmbed, PatchMerger, RMSNorm, SwiGLUMLP, VisionMLP
from m4ov_kernels.patches import gelu, loss, moe, unfit
from m4ov_kernels.patches.classes import Part
from m4ov_kernels.patches.family import Family
from m4ov_kernels.patches.features import DeepStack, PlacedFeatures, ScatteredFeatures
from m4ov_kernels.patches.layers import DecoderLayer, VisionBlock
from m4ov_kernels.patches.positions import MRopePositions
from m4ov_kernels.patches.qwen3_vl import attention
from m4ov_kernels.patches.text_attention import InterleavedAttention, RotaryPositions, not_rotated_so
from m4ov_kernels.patches.vision_tower import (
    InterpolatedPositions,
    OrderOfPatches,
    RotatedVisionAttention,
    not_bilinear,
)

FAMILY = Family(
    name="Qwen3-VL-MoE",
    parts=(
        Part("rms_norm", hf.Qwen3VLMoeTextRMSNorm, RMSNorm),
        Part("rms_norm", hf.Qwen3VLMoeTextDecoderLayer, DecoderLayer),
        Part("swiglu", hf.Qwen3VLMoeTextMLP, SwiGLUMLP, unfit=unfit.not_silu),
        Part("route_topk", hf.Qwen3VLMoeTextTopKRouter, moe.Router),
        Part("grouped_linear", hf.Qwen3VLMoeTextExperts, moe.Experts, unfit=unfit.not_silu),
        Part("qk_norm_mrope", hf.Qwen3VLMoeTextRotaryEmbedding, RotaryPositions, unfit=not_rotated_so),
        Part("qk_norm_mrope", hf.Qwen3VLMoeTextAttention, InterleavedAttention, unfit=not_rotated_so),
        Part("mrope_positions", hf.Qwen3VLMoeModel, MRopePositions),
        Part("scatter_vision", hf.Qwen3VLMoeModel, ScatteredFeatures),
        Part("scatter_vision", hf.Qwen3VLMoeTextModel, PlacedFeatures),
        Part("deepstack_add", hf.Qwen3VLMoeTextModel, DeepStack),
        Part("patch_embed", hf.Qwen3VLMoeVisionPatchEmbed, PatchEmbed, unfit=unfit.not_conv3d),
        Part("interpolate_position_embeddings", hf.Qwen3VLMoeVisionModel, InterpolatedPositions, unfit=not_bilinear),
        Part("vision_rope", hf.Qwen3VLMoeVisionModel, OrderOfPatches),
        Part("vision_rope", hf.Qwen3VLMoeVisionAttention, RotatedVisionAttention),
        Part("layer_norm", nn.LayerNorm, LayerNorm, where="model.visual.*"),
        Part("layer_norm", hf.Qwen3VLMoeVisionBlock, VisionBlock),
        Part("gelu_tanh", hf.Qwen3VLMoeVisionMLP, VisionMLP, unfit=gelu.not_gelu_tanh),
        Part("gelu", hf.Qwen3VLMoeVisionPatchMerger, PatchMerger, unfit=gelu.not_gelu),
        *loss.parts(hf.Qwen3VLMoeForConditionalGeneration),
    ),
    attention=attention,
)

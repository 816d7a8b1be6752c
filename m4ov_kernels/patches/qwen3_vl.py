"""Qwen3-VL, as transformers has it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.qwen3_vl import modeling_qwen3_vl as hf

from m4ov_kernels.nn import LayerNorm, PatchEmbed, PatchMerger, RMSNorm, SwiGLUMLP, VisionMLP
from m4ov_kernels.patches import gelu, loss, unfit
from m4ov_kernels.patches.attention import TEXT_ATTENTION, VISION_ATTENTION, Hook
from m4ov_kernels.patches.classes import Part
from m4ov_kernels.patches.family import Family
from m4ov_kernels.patches.features import DeepStack, PlacedFeatures, ScatteredFeatures
from m4ov_kernels.patches.layers import DecoderLayer, VisionBlock
from m4ov_kernels.patches.packing import pack_images, pack_text
from m4ov_kernels.patches.positions import MRopePositions
from m4ov_kernels.patches.text_attention import InterleavedAttention, RotaryPositions, not_rotated_so
from m4ov_kernels.patches.vision_tower import (
    InterpolatedPositions,
    OrderOfPatches,
    RotatedVisionAttention,
    not_bilinear,
)


def attention(model: Any) -> tuple[Hook, ...]:
    return (
        Hook(model.model.language_model, "text_config", TEXT_ATTENTION, pack_text),
        Hook(model.model.visual, "vision_config", VISION_ATTENTION, pack_images),
    )


FAMILY = Family(
    name="Qwen3-VL",
    parts=(
        Part("rms_norm", hf.Qwen3VLTextRMSNorm, RMSNorm),
        Part("rms_norm", hf.Qwen3VLTextDecoderLayer, DecoderLayer),
        Part("swiglu", hf.Qwen3VLTextMLP, SwiGLUMLP, unfit=unfit.not_silu),
        Part("qk_norm_mrope", hf.Qwen3VLTextRotaryEmbedding, RotaryPositions, unfit=not_rotated_so),
        Part("qk_norm_mrope", hf.Qwen3VLTextAttention, InterleavedAttention, unfit=not_rotated_so),
        Part("mrope_positions", hf.Qwen3VLModel, MRopePositions),
        Part("scatter_vision", hf.Qwen3VLModel, ScatteredFeatures),
        Part("scatter_vision", hf.Qwen3VLTextModel, PlacedFeatures),
        Part("deepstack_add", hf.Qwen3VLTextModel, DeepStack),
        Part("patch_embed", hf.Qwen3VLVisionPatchEmbed, PatchEmbed, unfit=unfit.not_conv3d),
        Part("interpolate_position_embeddings", hf.Qwen3VLVisionModel, InterpolatedPositions, unfit=not_bilinear),
        Part("vision_rope", hf.Qwen3VLVisionModel, OrderOfPatches),
        Part("vision_rope", hf.Qwen3VLVisionAttention, RotatedVisionAttention),
        Part("layer_norm", nn.LayerNorm, LayerNorm, where="model.visual.*"),
        Part("layer_norm", hf.Qwen3VLVisionBlock, VisionBlock),
        Part("gelu_tanh", hf.Qwen3VLVisionMLP, VisionMLP, unfit=gelu.not_gelu_tanh),
        Part("gelu", hf.Qwen3VLVisionPatchMerger, PatchMerger, unfit=gelu.not_gelu),
        *loss.parts(hf.Qwen3VLForConditionalGeneration),
    ),
    attention=attention,
)

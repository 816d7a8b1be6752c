"""Qwen2.5-VL, as transformers has it."""

from __future__ import annotations

from typing import Any

from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as hf

from m4ov_kernels.nn import PatchEmbed, RMSNorm, SwiGLUMLP
from m4ov_kernels.patches import gelu, loss, unfit
from m4ov_kernels.patches.attention import TEXT_ATTENTION, VISION_ATTENTION, Hook
from m4ov_kernels.patches.classes import Part
from m4ov_kernels.patches.family import Family
from m4ov_kernels.patches.features import ScatteredFeatures
from m4ov_kernels.patches.layers import DecoderLayer, VisionBlock
from m4ov_kernels.patches.packing import drop_text_packing, pack_text
from m4ov_kernels.patches.positions import Qwen2_5MRopePositions
from m4ov_kernels.patches.text_attention import RotaryPositions, RotatedAttention, not_rotated_so
from m4ov_kernels.patches.vision_tower import RotatedVisionAttention
from m4ov_kernels.patches.window_tower import OrderOfWindows


def attention(model: Any) -> tuple[Hook, ...]:
    text, vision = model.model.language_model, model.model.visual
    return (
        Hook(text, "text_config", TEXT_ATTENTION, pack_text, unfit=unfit.sliding_window(text)),
        Hook(vision, "vision_config", VISION_ATTENTION, drop_text_packing),
    )


FAMILY = Family(
    name="Qwen2.5-VL",
    parts=(
        Part("rms_norm", hf.Qwen2_5_VLRMSNorm, RMSNorm),
        Part("rms_norm", hf.Qwen2_5_VLDecoderLayer, DecoderLayer),
        Part("rms_norm", hf.Qwen2_5_VLVisionBlock, VisionBlock),
        Part("swiglu", hf.Qwen2MLP, SwiGLUMLP, unfit=unfit.not_silu),
        Part("swiglu", hf.Qwen2_5_VLMLP, SwiGLUMLP, unfit=unfit.not_silu),
        Part("qk_norm_mrope", hf.Qwen2_5_VLRotaryEmbedding, RotaryPositions, unfit=not_rotated_so),
        Part("qk_norm_mrope", hf.Qwen2_5_VLAttention, RotatedAttention, unfit=not_rotated_so),
        Part("mrope_positions", hf.Qwen2_5_VLModel, Qwen2_5MRopePositions),
        Part("scatter_vision", hf.Qwen2_5_VLModel, ScatteredFeatures),
        Part("patch_embed", hf.Qwen2_5_VisionPatchEmbed, PatchEmbed, unfit=unfit.not_conv3d),
        Part("vision_rope", hf.Qwen2_5_VisionTransformerPretrainedModel, OrderOfWindows),
        Part("vision_rope", hf.Qwen2_5_VLVisionAttention, RotatedVisionAttention),
        Part("gelu", hf.Qwen2_5_VLPatchMerger, gelu.Qwen2_5PatchMerger, unfit=gelu.not_gelu),
        *loss.parts(hf.Qwen2_5_VLForConditionalGeneration),
    ),
    attention=attention,
)

"""Qwen2.5-VL, as transformers has it."""

from __future__ import annotations

from typing import Any

from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as hf

from m4ov_kernels.nn import PatchEmbed, RMSNorm, SwiGLUMLP
from m4ov_kernels.patches import loss, unfit
from m4ov_kernels.patches.attention import TEXT_ATTENTION, VISION_ATTENTION, Hook
from m4ov_kernels.patches.classes import Part
from m4ov_kernels.patches.family import Family
from m4ov_kernels.patches.layers import DecoderLayer, VisionBlock
from m4ov_kernels.patches.packing import drop_text_packing, pack_text


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
        Part("patch_embed", hf.Qwen2_5_VisionPatchEmbed, PatchEmbed, unfit=unfit.not_conv3d),
        *loss.parts(hf.Qwen2_5_VLForConditionalGeneration),
    ),
    attention=attention,
)

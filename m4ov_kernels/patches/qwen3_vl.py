"""Qwen3-VL, as transformers has it."""

from __future__ import annotations

from typing import Any

from transformers.models.qwen3_vl import modeling_qwen3_vl as hf

from m4ov_kernels.nn import PatchEmbed, RMSNorm, SwiGLUMLP
from m4ov_kernels.patches import loss, unfit
from m4ov_kernels.patches.attention import TEXT_ATTENTION, VISION_ATTENTION, Hook
from m4ov_kernels.patches.classes import Part
from m4ov_kernels.patches.family import Family
from m4ov_kernels.patches.layers import DecoderLayer
from m4ov_kernels.patches.packing import pack_images, pack_text


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
        Part("patch_embed", hf.Qwen3VLVisionPatchEmbed, PatchEmbed, unfit=unfit.not_conv3d),
        *loss.parts(hf.Qwen3VLForConditionalGeneration),
    ),
    attention=attention,
)

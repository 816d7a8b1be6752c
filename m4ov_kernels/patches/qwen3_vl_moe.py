"""Qwen3-VL with a mixture of experts, as transformers has it; the experts and their router stay as they are."""

from __future__ import annotations

from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as hf

from m4ov_kernels.nn import PatchEmbed, RMSNorm, SwiGLUMLP
from m4ov_kernels.patches import loss, unfit
from m4ov_kernels.patches.classes import Part
from m4ov_kernels.patches.family import Family
from m4ov_kernels.patches.layers import DecoderLayer
from m4ov_kernels.patches.qwen3_vl import attention

FAMILY = Family(
    name="Qwen3-VL-MoE",
    parts=(
        Part("rms_norm", hf.Qwen3VLMoeTextRMSNorm, RMSNorm),
        Part("rms_norm", hf.Qwen3VLMoeTextDecoderLayer, DecoderLayer),
        Part("swiglu", hf.Qwen3VLMoeTextMLP, SwiGLUMLP, unfit=unfit.not_silu),
        Part("patch_embed", hf.Qwen3VLMoeVisionPatchEmbed, PatchEmbed, unfit=unfit.not_conv3d),
        *loss.parts(hf.Qwen3VLMoeForConditionalGeneration),
    ),
    attention=attention,
)

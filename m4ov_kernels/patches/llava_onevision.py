"""LLaVA-OneVision with SigLIP and Qwen2, as transformers has it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.llava_onevision import modeling_llava_onevision as hf
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.siglip import modeling_siglip as siglip

from m4ov_kernels.nn import LayerNorm, RMSNorm, SwiGLUMLP
from m4ov_kernels.patches import gelu, loss, unfit
from m4ov_kernels.patches.attention import TEXT_ATTENTION, VISION_ATTENTION, Hook
from m4ov_kernels.patches.classes import Part
from m4ov_kernels.patches.family import Family
from m4ov_kernels.patches.layers import DecoderLayer, SiglipLayer
from m4ov_kernels.patches.llava_features import LlavaFeatures
from m4ov_kernels.patches.packing import pack_plain_text
from m4ov_kernels.patches.text_attention import PlainAttention, RotaryPositions, not_rotated_so


def attention(model: Any) -> tuple[Hook, ...]:
    text, vision = model.model.language_model, model.model.vision_tower
    no_qwen2 = unfit.not_a(text, qwen2.Qwen2Model)
    return (
        Hook(text, "text_config", TEXT_ATTENTION, pack_plain_text, unfit=no_qwen2 or unfit.sliding_window(text)),
        Hook(vision, "vision_config", VISION_ATTENTION, unfit=unfit.not_a(vision, siglip.SiglipVisionModel)),
    )


FAMILY = Family(
    name="LLaVA-OneVision",
    parts=(
        Part("rms_norm", qwen2.Qwen2RMSNorm, RMSNorm),
        Part("rms_norm", qwen2.Qwen2DecoderLayer, DecoderLayer),
        Part("swiglu", qwen2.Qwen2MLP, SwiGLUMLP, unfit=unfit.not_silu),
        Part("qk_norm_mrope", qwen2.Qwen2RotaryEmbedding, RotaryPositions, unfit=not_rotated_so),
        Part("qk_norm_mrope", qwen2.Qwen2Attention, PlainAttention, unfit=not_rotated_so),
        Part("scatter_vision", hf.LlavaOnevisionModel, LlavaFeatures),
        Part("layer_norm", nn.LayerNorm, LayerNorm, where="model.vision_tower.*"),
        Part("layer_norm", siglip.SiglipEncoderLayer, SiglipLayer),
        Part("gelu_tanh", siglip.SiglipMLP, gelu.SiglipMLP, unfit=gelu.not_gelu_tanh),
        Part("gelu", hf.LlavaOnevisionMultiModalProjector, gelu.Projector, unfit=gelu.not_gelu),
        *loss.parts(hf.LlavaOnevisionForConditionalGeneration),
    ),
    attention=attention,
)

"""A small Qwen3-VL with random weights: transformers' own classes, dense or with experts, sized by a recipe."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from m4ov.recipe import ModelConfig

Configuration = Qwen3VLConfig | Qwen3VLMoeConfig


def qwen3_vl_config(model: ModelConfig, tokenizer: Tokenizer, *, grid: int) -> Configuration:
    """transformers' configuration.

    Args:
        tokenizer: gives the special tokens' ids and the vocabulary, which is rounded up to a multiple of 32.
        grid: patches a side of the images; the learned position table has this size, so none is interpolated.
    """

    def token(text: str) -> int:
        found = tokenizer.token_to_id(text)
        if found is None:
            raise ValueError(f"the tokenizer has no token {text}")
        return found

    text, vision = model.text, model.vision
    half = text.head_dim // 2
    side = half * 5 // 16  # the proportions of Qwen3-VL: 24, 20, 20 of 64
    experts: dict[str, Any] = {
        "num_experts": text.num_experts,
        "num_experts_per_tok": text.num_experts_per_tok,
        "moe_intermediate_size": text.moe_intermediate_size,
        "router_aux_loss_coef": text.router_aux_loss_coef,
    }
    kind = Qwen3VLMoeConfig if text.num_experts else Qwen3VLConfig
    return kind(
        text_config={
            **(experts if text.num_experts else {}),
            "vocab_size": math.ceil(tokenizer.get_vocab_size() / 32) * 32,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.key_value_heads,
            "head_dim": text.head_dim,
            "max_position_embeddings": 4096,
            "initializer_range": model.initializer_range,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [half - 2 * side, side, side],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "pad_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
        },
        vision_config={
            "depth": vision.layers,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.heads,
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.merge_size,
            "temporal_patch_size": 2,
            "out_hidden_size": text.hidden_size,
            "num_position_embeddings": grid * grid,
            "deepstack_visual_indexes": list(vision.deepstack_layers),
            "initializer_range": model.initializer_range,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def config_of(values: dict[str, Any]) -> Configuration:
    """Of what its ``to_dict`` gave."""
    found: Any = AutoConfig.for_model(**values)
    return found  # type: ignore[no-any-return]


def build(config: Configuration, seed: int) -> Any:
    """The model with float32 weights that depend on ``seed`` alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = copy.deepcopy(config)  # a patch changes the configuration that the model holds
        kind: Any = (
            Qwen3VLMoeForConditionalGeneration
            if isinstance(config, Qwen3VLMoeConfig)
            else Qwen3VLForConditionalGeneration
        )
        model = kind(config)
    generation: Any = model.generation_config
    text: Any = config.text_config
    generation.eos_token_id, generation.pad_token_id = text.eos_token_id, text.pad_token_id
    return model


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters in another dtype, buffers as they are: rotary frequencies must stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model

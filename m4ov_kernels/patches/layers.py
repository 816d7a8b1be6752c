"""Fronts of transformers' layers: a residual add fused with the norm that follows it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class DecoderLayer:
    """Front of a pre-norm decoder layer: the add after attention is fused with the norm before the MLP (or experts)."""

    keeps_signature = True

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        if args:  # transformers passes keywords; which position means what differs by model
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        kwargs.setdefault("attention_mask", None)
        attention = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]
        normed, residual = layer.post_attention_layernorm(attention, residual=hidden_states)
        return residual + layer.mlp(normed)


class VisionBlock:
    """Front of Qwen's vision block, likewise."""

    keeps_signature = True

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        block: Any = self
        attention = block.attn(block.norm1(hidden_states), *args, **kwargs)
        normed, residual = block.norm2(attention, residual=hidden_states)
        return residual + block.mlp(normed)


class SiglipLayer:
    """Front of SigLIP's encoder layer, likewise."""

    keeps_signature = True

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        layer: Any = self
        attention = layer.self_attn(
            hidden_states=layer.layer_norm1(hidden_states), attention_mask=attention_mask, **kwargs
        )[0]
        normed, residual = layer.layer_norm2(attention, residual=hidden_states)
        return residual + layer.mlp(normed)

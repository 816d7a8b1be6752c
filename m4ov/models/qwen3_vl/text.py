"""The language model: packed samples, M-RoPE, DeepStack features added to the first layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from m4ov.models.qwen3_vl.config import TextConfig
from m4ov_kernels.moe import ExpertLoad
from m4ov_kernels.nn import MoE, RMSNorm, Rotation, SwiGLUMLP, TextAttention
from m4ov_kernels.vision import deepstack_add


class Packing(NamedTuple):
    """The samples of a row of T tokens.

    Attributes:
        position_ids: int64 ``[3, T]``, of M-RoPE.
        cu_seqlens: int32 ``[N + 1]``.
        max_seqlen: tokens of the longest.
    """

    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


class Placed(NamedTuple):
    """DeepStack features and the tokens that they are added to.

    Attributes:
        positions: int64 ``[V]``.
        layers: ``[V, D]`` for each of the first layers.
    """

    positions: Tensor
    layers: Sequence[Tensor]


class DecoderLayer(nn.Module):
    """Causal attention inside each sample, then an MLP or experts; both pre-norm; parameters named as in Hugging Face's
    layers.

    Args:
        sparse: whether it has experts.
    """

    def __init__(self, config: TextConfig, *, sparse: bool) -> None:
        super().__init__()
        self.sparse = sparse
        self.self_attn = TextAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            rotation=Rotation(config.rope_theta, config.mrope_section, True),
            eps=config.rms_norm_eps,
            bias=config.attention_bias,
            output_bias=config.attention_bias,
        )
        self.mlp: nn.Module = (
            MoE(config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok)
            if sparse
            else SwiGLUMLP(config.hidden_size, config.intermediate_size)
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, packing: Packing) -> tuple[Tensor, ExpertLoad | None]:
        """``[T, hidden_size]`` → ``[T, hidden_size]``, and how the experts, if any, were chosen."""
        attended = self.self_attn(self.input_layernorm(hidden_states), *packing)
        normed, residual = self.post_attention_layernorm(attended, residual=hidden_states)
        made, load = self.mlp(normed) if self.sparse else (self.mlp(normed), None)
        return residual + made, load


class TextModel(nn.Module):
    """Embedding, layers and last norm; parameters named as in Hugging Face's ``model.language_model``."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DecoderLayer(config, sparse=config.sparse(layer)) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, inputs_embeds: Tensor, packing: Packing, placed: Placed | None = None
    ) -> tuple[Tensor, tuple[ExpertLoad, ...]]:
        """``[T, hidden_size]`` → ``[T, hidden_size]``, normalised, and the load of each layer with experts."""
        hidden_states, loads = inputs_embeds, []
        for index, layer in enumerate(self.layers):
            hidden_states, load = layer(hidden_states, packing)
            if load is not None:
                loads.append(load)
            if placed is not None and index < len(placed.layers):
                features = placed.layers[index].to(hidden_states.dtype)
                hidden_states = deepstack_add(hidden_states, features, placed.positions)
        return self.norm(hidden_states), tuple(loads)

"""The language model: packed samples, M-RoPE, DeepStack features added to the first layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from m4ov.models.qwen3_vl.config import TextConfig
from m4ov_kernels.nn import RMSNorm, Rotation, SwiGLUMLP, TextAttention
from m4ov_kernels.nn.residual import add_norm_mlp
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
    """Causal attention inside each sample, then an MLP; both pre-norm; parameters named as in Hugging Face's layers."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
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
        self.mlp = SwiGLUMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, packing: Packing) -> Tensor:
        """``[T, hidden_size]`` → ``[T, hidden_size]``."""
        attended = self.self_attn(self.input_layernorm(hidden_states), *packing)
        return add_norm_mlp(hidden_states, attended, self.post_attention_layernorm, self.mlp)


class TextModel(nn.Module):
    """Embedding, layers and last norm; parameters named as in Hugging Face's ``model.language_model``."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, inputs_embeds: Tensor, packing: Packing, placed: Placed | None = None) -> Tensor:
        """``[T, hidden_size]`` → ``[T, hidden_size]``, normalised."""
        hidden_states = inputs_embeds
        for index, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, packing)
            if placed is not None and index < len(placed.layers):
                hidden_states = deepstack_add(hidden_states, placed.layers[index], placed.positions)
        return self.norm(hidden_states)

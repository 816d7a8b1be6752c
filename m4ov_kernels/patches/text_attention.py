"""Fronts of transformers' text attention and rotary embedding: positions go down to the layers as they are, and are
applied with the norms of queries and keys in one pass."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from m4ov_kernels.nn.attention import Rotation, TextAttention


class RotaryPositions:
    """Front of a rotary embedding: hands on the positions that it was given, ``[3, B, T]`` or ``[B, T]``."""

    keeps_signature = True

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        return position_ids


class RotatedAttention(TextAttention):
    """Front of a text attention, which takes positions for ``position_embeddings``. Sections follow one another."""

    keeps_signature = True
    interleaved = False
    section: tuple[int, ...] | None = (16, 24, 24)  # where the configuration has none

    @property
    def rotation(self) -> Rotation:  # type: ignore[override]
        parameters = self.config.rope_parameters  # type: ignore[union-attr]
        section = parameters.get("mrope_section", self.section)  # type: ignore[union-attr, operator]
        theta = float(parameters["rope_theta"])  # type: ignore[index, arg-type]
        return Rotation(theta, None if section is None else tuple(section), self.interleaved)  # type: ignore[arg-type]

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        attention: Any = self
        positions = position_embeddings.expand(*position_embeddings.shape[:-2], *hidden_states.shape[:-1])
        q, k, v = (x.transpose(1, 2) for x in self.project(hidden_states, positions))  # [B, H, T, D]
        cache = past_key_values if cache is None else cache
        if cache is not None:
            k, v = cache.update(k.to(v.dtype), v, attention.layer_idx)
        if hasattr(attention, "sliding_window"):
            kwargs["sliding_window"] = attention.sliding_window
        output, weights = attention_function(attention)(
            attention,
            q,
            k,
            v,
            attention_mask,
            dropout=attention.attention_dropout if attention.training else 0.0,
            scaling=attention.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class InterleavedAttention(RotatedAttention):
    """The sections alternate, as in Qwen3-VL."""

    interleaved = True
    section = (24, 20, 20)


class PlainAttention(RotatedAttention):
    """One position a token."""

    section = None


def attention_function(module: Any) -> Any:
    """The implementation that a module's configuration names now."""
    eager = sys.modules[module.original.__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)


def not_rotated_so(module: Any) -> str | None:
    """Why the rotary embedding of a module's configuration is not the operator's."""
    parameters = module.config.rope_parameters
    if parameters["rope_type"] != "default":
        return f"its rotary embedding is {parameters['rope_type']!r}, not 'default'"
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "it rotates a part of each head"
    return None

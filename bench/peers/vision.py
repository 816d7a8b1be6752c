"""Peers of the vision operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_bench.peers.base import Absent, Compiled, Peer, compiled_peer, transformers_module


def scatter_vision(mask: Tensor, compiled: Compiled = True) -> dict[str, Peer]:
    """Functions of ``(inputs_embeds, features)``. Hugging Face's models compute the eager expression; ``mask``: bool
    ``[T]``, its visual positions."""

    def eager(inputs_embeds: Tensor, features: Tensor) -> Tensor:
        return inputs_embeds.masked_scatter(mask[:, None], features)

    def index_copy(inputs_embeds: Tensor, features: Tensor) -> Tensor:
        return inputs_embeds.index_copy(0, positions, features)

    positions = mask.nonzero()[:, 0]
    return {"eager": eager, "index_copy": index_copy, "torch.compile": compiled_peer(eager, compiled)}


def deepstack_add(mask: Tensor, compiled: Compiled = True) -> dict[str, Peer]:
    """Functions of ``(hidden_states, features)``; the eager one is Hugging Face's ``_deepstack_process``."""

    def eager(hidden_states: Tensor, features: Tensor) -> Tensor:
        hidden_states = hidden_states.clone()
        hidden_states[mask, :] = hidden_states[mask, :] + features
        return hidden_states

    def index_add(hidden_states: Tensor, features: Tensor) -> Tensor:
        return hidden_states.index_add(0, positions, features)

    positions = mask.nonzero()[:, 0]
    return {"eager": eager, "index_add": index_add, "torch.compile": compiled_peer(eager, compiled)}


def interpolate_position_embeddings(
    grid_thw: Tensor, side: int, merge_size: int, compiled: Compiled = True
) -> dict[str, Peer]:
    """Functions of ``(table, hidden_states)``. ``Hugging Face``: as its vision tower does it; ``eager`` is spared the
    indices and weights, which it is given; ``torch.compile``: of that."""
    utilities = transformers_module("transformers.vision_utils")
    if isinstance(utilities, Absent):
        return {"eager": utilities, "Hugging Face": utilities, "torch.compile": utilities}

    def places() -> tuple[Tensor, Tensor]:  # [N, 4] each
        if hasattr(utilities, "get_vision_interpolation_indices_and_weights"):
            found: tuple[Tensor, Tensor] = utilities.get_vision_interpolation_indices_and_weights(
                grid_thw, side, mode="bilinear", align_corners=True, spatial_merge_size=merge_size
            )
            return found
        indices, weights = utilities.get_vision_bilinear_indices_and_weights(grid_thw, side, merge_size)
        return indices.t(), weights.t()

    def embed(table: Tensor, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        embedded = (F.embedding(indices, table) * weights[:, :, None]).sum(1)
        return hidden_states + embedded.to(hidden_states.dtype)

    def hugging_face(table: Tensor, hidden_states: Tensor) -> Tensor:
        return embed(table, hidden_states, *places())

    with torch.no_grad():
        indices, weights = places()

    def eager(table: Tensor, hidden_states: Tensor) -> Tensor:
        return embed(table, hidden_states, indices, weights)

    return {"eager": eager, "Hugging Face": hugging_face, "torch.compile": compiled_peer(eager, compiled)}

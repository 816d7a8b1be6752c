"""The definitions of ``scatter_vision`` and ``deepstack_add``."""

from __future__ import annotations

from torch import Tensor


def scatter_vision(inputs_embeds: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """See :func:`m4ov_kernels.vision.scatter_vision`."""
    rows = inputs_embeds.reshape(-1, inputs_embeds.shape[-1])
    return rows.index_copy(0, positions, features).reshape(inputs_embeds.shape)


def deepstack_add(hidden_states: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """See :func:`m4ov_kernels.vision.deepstack_add`."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    return rows.index_add(0, positions, features).reshape(hidden_states.shape)

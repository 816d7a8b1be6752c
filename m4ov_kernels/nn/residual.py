"""Pre-norm blocks: a residual add fused with the norm that follows it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def add_norm_mlp(hidden_states: Tensor, attended: Tensor, norm: Any, mlp: Any) -> Tensor:
    """``h + mlp(norm(h))`` with ``h = hidden_states + attended``: the second half of a pre-norm block.

    Args:
        norm: a module that is called with ``residual``: :class:`m4ov_kernels.nn.RMSNorm` or ``LayerNorm``.
        mlp: any module, tensor to tensor.
    """
    normed, residual = norm(attended, residual=hidden_states)
    return residual + mlp(normed)

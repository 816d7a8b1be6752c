"""The norms as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m4ov_kernels.norm import layer_norm, rms_norm


class RMSNorm(nn.Module):
    """:func:`m4ov_kernels.rms_norm` with its weight; attributes named as in Hugging Face's modules.

    Args:
        hidden_size: D, the size of the last dimension.
        eps: added to the mean square.
        numerics: see :func:`m4ov_kernels.rms_norm`.
    """

    numerics = "hf"  # on the class too: a patched Hugging Face module has no such attribute of its own

    def __init__(self, hidden_size: int, eps: float = 1e-6, *, numerics: str = "hf") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps
        if numerics != self.numerics:
            self.numerics = numerics

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """``[..., D]`` → ``[..., D]``; with ``residual`` → ``(normalised sum, sum)``.

        A residual of another dtype (autocast keeps it in float32) is added as PyTorch promotes, then normalised.
        """
        if residual is not None and residual.dtype is not hidden_states.dtype:
            total = hidden_states + residual
            return rms_norm(total, self.weight, eps=self.variance_epsilon, numerics=self.numerics), total
        if residual is None:
            return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon, numerics=self.numerics)
        return rms_norm(
            hidden_states, self.weight, eps=self.variance_epsilon, residual=residual, numerics=self.numerics
        )

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}, numerics={self.numerics!r}"


class LayerNorm(nn.LayerNorm):
    """:func:`m4ov_kernels.layer_norm` as PyTorch's module: attributes, parameters and checkpoints are the same, and an
    ``nn.LayerNorm`` over one dimension becomes one by a change of its class.

    Args:
        normalized_shape: D, the size of the last dimension, or ``[D]``.
        Others as in :class:`torch.nn.LayerNorm`.
    """

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``[..., D]`` → ``[..., D]``; with ``residual`` → ``(normalised sum, sum)``.

        A residual of another dtype (autocast keeps it in float32) is added as PyTorch promotes, then normalised.
        """
        if len(self.normalized_shape) != 1:
            raise ValueError(f"LayerNorm: normalized_shape must be one dimension; got {list(self.normalized_shape)}")
        if residual is not None and residual.dtype is not hidden_states.dtype:
            total = hidden_states + residual
            return layer_norm(total, self.weight, self.bias, eps=self.eps), total
        if residual is None:
            return layer_norm(hidden_states, self.weight, self.bias, eps=self.eps)
        return layer_norm(hidden_states, self.weight, self.bias, eps=self.eps, residual=residual)

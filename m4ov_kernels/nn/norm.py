"""RMSNorm as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m4ov_kernels.norm import rms_norm


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

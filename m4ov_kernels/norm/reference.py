"""The definition of the norms, in plain PyTorch: differentiable any number of times, exact in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(
    hidden_states: Tensor, weight: Tensor, eps: float, residual: Tensor | None, numerics: str
) -> tuple[Tensor, Tensor]:
    """See :func:`m4ov_kernels.norm.rms_norm`; returns the normalised sum and the sum (without residual: the input)."""
    dtype = hidden_states.dtype
    compute = torch.promote_types(dtype, torch.float32)
    exact = hidden_states.to(compute)
    total = hidden_states
    if residual is not None:
        exact = exact + residual.to(compute)
        total = exact.to(dtype)
        if numerics != "fp32":
            exact = total.to(compute)
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    if numerics == "hf":
        return weight * normed.to(dtype), total
    return (normed * weight.to(compute)).to(dtype), total


def layer_norm(
    hidden_states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    numerics: str,
) -> tuple[Tensor, Tensor]:
    """See :func:`m4ov_kernels.norm.layer_norm`; returns the normalised sum and the sum (without residual: the
    input)."""
    dtype = hidden_states.dtype
    compute = torch.promote_types(dtype, torch.float32)
    exact = hidden_states.to(compute)
    total = hidden_states
    if residual is not None:
        exact = exact + residual.to(compute)
        total = exact.to(dtype)
        if numerics != "fp32":
            exact = total.to(compute)
    scale, shift = (None if tensor is None else tensor.to(compute) for tensor in (weight, bias))
    return F.layer_norm(exact, exact.shape[-1:], scale, shift, eps).to(dtype), total

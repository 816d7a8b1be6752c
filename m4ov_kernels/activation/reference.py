"""The definition of the activations, in plain PyTorch: differentiable any number of times, exact in float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_gelu(input: Tensor, approximate: str) -> Tensor:
    """PyTorch's GELU, to the bit; in float64 without its cancellation: far below 0 its 1 + tanh and 1 + erf are 0 there
    too, where GELU is not (of -10 it is -1.2e-37 and -7.6e-23)."""
    if input.dtype is not torch.float64:
        return F.gelu(input, approximate=approximate)
    if approximate == "tanh":  # 1 + tanh y = 2 sigmoid(2y)
        return input * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (input + 0.044715 * input**3))
    return input * (torch.erfc(input * -math.sqrt(0.5)) / 2)


def swiglu(gate: Tensor, up: Tensor, numerics: str) -> Tensor:
    """See :func:`m4ov_kernels.activation.swiglu`."""
    if numerics == "fp32":
        compute = torch.promote_types(gate.dtype, torch.float32)
        return (F.silu(gate.to(compute)) * up.to(compute)).to(gate.dtype)
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor, approximate: str, numerics: str) -> Tensor:
    """See :func:`m4ov_kernels.activation.geglu`."""
    if numerics == "fp32":
        compute = torch.promote_types(gate.dtype, torch.float32)
        return (plain_gelu(gate.to(compute), approximate) * up.to(compute)).to(gate.dtype)
    return plain_gelu(gate, approximate) * up


def gelu(input: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """See :func:`m4ov_kernels.activation.gelu`."""
    compute = torch.promote_types(input.dtype, torch.float32)
    total = input.to(compute)
    if bias is not None:
        total = total + bias.to(compute)
    # The product by one hands GELU's backward (oneDNN's) a gradient of its own: it refuses one whose rows overlap.
    return (plain_gelu(total, approximate) * 1.0).to(input.dtype)

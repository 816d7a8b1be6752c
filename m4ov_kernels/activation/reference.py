"""The definition of the activations, in plain PyTorch: differentiable any number of times, exact in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
        return (F.gelu(gate.to(compute), approximate=approximate) * up.to(compute)).to(gate.dtype)
    return F.gelu(gate, approximate=approximate) * up


def gelu(input: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """See :func:`m4ov_kernels.activation.gelu`."""
    compute = torch.promote_types(input.dtype, torch.float32)
    total = input.to(compute)
    if bias is not None:
        total = total + bias.to(compute)
    # The product by one hands GELU's backward (oneDNN's) a gradient of its own: it refuses one whose rows overlap.
    return (F.gelu(total, approximate=approximate) * 1.0).to(input.dtype)

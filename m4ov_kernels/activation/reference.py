"""The definition of the gated activations, in plain PyTorch: differentiable any number of times, exact in float64."""

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

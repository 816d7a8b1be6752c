"""The definitions of the vision operators, in plain PyTorch: differentiable any number of times, exact in float64.

One file for each group of operators; this one hands their names on.
"""

from __future__ import annotations

from m4ov_kernels.vision.reference.interpolate import interpolate_position_embeddings
from m4ov_kernels.vision.reference.rope import vision_rope
from m4ov_kernels.vision.reference.scatter import deepstack_add, scatter_vision

__all__ = [
    "deepstack_add",
    "interpolate_position_embeddings",
    "scatter_vision",
    "vision_rope",
]

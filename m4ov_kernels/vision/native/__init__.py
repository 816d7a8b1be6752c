"""The vision operators through the compiled kernels (CPU). One file for each group of operators; this one hands
their raw functions on, under the names that :meth:`m4ov_kernels.dispatch.Operator.load` asks for."""

from __future__ import annotations

from m4ov_kernels.vision.native.interpolate import (
    interpolate_position_embeddings_bwd,
    interpolate_position_embeddings_fwd,
)
from m4ov_kernels.vision.native.rope import vision_rope_bwd, vision_rope_fwd
from m4ov_kernels.vision.native.scatter import (
    deepstack_add_bwd,
    deepstack_add_fwd,
    scatter_vision_bwd,
    scatter_vision_fwd,
)

__all__ = [
    "deepstack_add_bwd",
    "deepstack_add_fwd",
    "interpolate_position_embeddings_bwd",
    "interpolate_position_embeddings_fwd",
    "scatter_vision_bwd",
    "scatter_vision_fwd",
    "vision_rope_bwd",
    "vision_rope_fwd",
]

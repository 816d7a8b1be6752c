"""The vision operators in Triton, for CUDA and ROCm (and, interpreted, for CPU tensors). One file for each group of
operators; this one hands their raw functions on, and the table of all their kernels."""

from __future__ import annotations

from m4ov_kernels.vision.pixels_cuda import CUDA_KERNELS
from m4ov_kernels.vision.triton import interpolate, rope, scatter
from m4ov_kernels.vision.triton.interpolate import (
    interpolate_position_embeddings_bwd,
    interpolate_position_embeddings_fwd,
)
from m4ov_kernels.vision.triton.rope import vision_rope_bwd, vision_rope_fwd
from m4ov_kernels.vision.triton.scatter import (
    deepstack_add_bwd,
    deepstack_add_fwd,
    scatter_vision_bwd,
    scatter_vision_fwd,
)

__all__ = [
    "KERNELS",
    "deepstack_add_bwd",
    "deepstack_add_fwd",
    "interpolate_position_embeddings_bwd",
    "interpolate_position_embeddings_fwd",
    "scatter_vision_bwd",
    "scatter_vision_fwd",
    "vision_rope_bwd",
    "vision_rope_fwd",
]

KERNELS = [*interpolate.KERNELS, *rope.KERNELS, *scatter.KERNELS, *CUDA_KERNELS]

"""The vision operators in Triton, for CUDA and ROCm (and, interpreted, for CPU tensors). One file for each group of
operators; this one hands their raw functions on, and the table of all their kernels."""

from __future__ import annotations

from m4ov_kernels.vision.triton import rope as _rope
from m4ov_kernels.vision.triton.rope import vision_rope_bwd, vision_rope_fwd

__all__ = ["KERNELS", "vision_rope_bwd", "vision_rope_fwd"]

KERNELS = [*_rope.KERNELS]

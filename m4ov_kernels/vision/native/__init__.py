"""The vision operators through the compiled kernels (CPU). One file for each group of operators; this one hands
their raw functions on, under the names that :meth:`m4ov_kernels.dispatch.Operator.load` asks for."""

from __future__ import annotations

from m4ov_kernels.vision.native.rope import vision_rope_bwd, vision_rope_fwd

__all__ = ["vision_rope_bwd", "vision_rope_fwd"]

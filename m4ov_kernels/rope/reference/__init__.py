"""The definitions, in plain PyTorch; a file for each operator."""

from __future__ import annotations

from m4ov_kernels.rope.reference.positions import mrope_positions

__all__ = ["mrope_positions"]

"""Rotary positions of vision-language models: ``mrope_positions``."""

from __future__ import annotations

from m4ov_kernels.rope.positions import mrope_positions

__all__ = ["mrope_positions"]

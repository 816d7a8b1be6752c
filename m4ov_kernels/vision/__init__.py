"""The front end of a vision tower, and the way of its features into the language model."""

from __future__ import annotations

from m4ov_kernels.vision.rope import VISION_ROPE, vision_rope

__all__ = ["VISION_ROPE", "vision_rope"]

"""The front end of a vision tower, and the way of its features into the language model."""

from __future__ import annotations

from m4ov_kernels.vision.interpolate import interpolate_position_embeddings
from m4ov_kernels.vision.pixels import PackedPatches, pack_patches
from m4ov_kernels.vision.positions import VisionPositions, vision_positions
from m4ov_kernels.vision.projection import patch_embed
from m4ov_kernels.vision.rope import VISION_ROPE, vision_rope
from m4ov_kernels.vision.scatter import deepstack_add, scatter_vision

__all__ = [
    "VISION_ROPE",
    "PackedPatches",
    "VisionPositions",
    "deepstack_add",
    "interpolate_position_embeddings",
    "pack_patches",
    "patch_embed",
    "scatter_vision",
    "vision_positions",
    "vision_rope",
]

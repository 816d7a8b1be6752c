"""The front end of a vision tower: from pixels to patches."""

from __future__ import annotations

from m4ov_kernels.vision.pixels import PackedPatches, pack_patches

__all__ = ["PackedPatches", "pack_patches"]

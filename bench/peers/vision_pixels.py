"""Peers of ``pack_patches``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from m4ov_bench import cases
from m4ov_bench.peers.base import Absent, Peer, transformers_module


def pack_patches(case: cases.PixelCase) -> Peer:
    """Hugging Face's image processor over Pillow and NumPy; it makes float32."""
    module = transformers_module("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    if isinstance(module, Absent):
        return module
    processor = module.Qwen2VLImageProcessorPil(
        patch_size=case.patch_size,
        size={"shortest_edge": case.min_pixels, "longest_edge": case.max_pixels},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )

    def call(images: list[Any]) -> Tensor:
        return processor(images, return_tensors="pt")["pixel_values"]

    return call

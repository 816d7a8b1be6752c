"""The definition of ``pack_patches``: Pillow resizes, NumPy normalises, a transposition makes patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from m4ov_kernels.vision.pixels import Clip, Layout


def pack_patches_fwd(clips: list[Clip], layout: Layout, device: torch.device) -> Tensor:
    """``pixel_values`` ``[N, C * t * p * p]``. Images on a GPU come to the CPU, and the result goes back."""
    parts = [_patches(clip, layout) for clip in clips]
    whole = np.concatenate([np.zeros((0, layout.patch_elements), dtype=np.float32), *parts])
    return torch.from_numpy(whole).to(layout.dtype).to(device)


def _patches(clip: Clip, layout: Layout) -> np.ndarray:
    frames = [_normalised(frame, clip, layout) for frame in clip.frames]  # [C, H, W] each
    frames += frames[-1:] * (-len(frames) % layout.temporal_patch_size)
    patch, merge = layout.patch_size, layout.merge_size
    time, height, width = layout.grid(clip)
    values = np.stack(frames).reshape(
        *(time, layout.temporal_patch_size, 3), *(height // merge, merge, patch), *(width // merge, merge, patch)
    )
    values = values.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)  # [t, block y, block x, y, x, C, frame, pixel y, pixel x]
    return values.reshape(time * height * width, layout.patch_elements)


def _normalised(frame: np.ndarray | Tensor, clip: Clip, layout: Layout) -> np.ndarray:
    from PIL import Image

    pixels = frame.cpu().numpy() if isinstance(frame, Tensor) else frame
    pixels = np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0))
    if pixels.shape[:2] != (clip.height, clip.width):
        pixels = np.asarray(Image.fromarray(pixels).resize((clip.width, clip.height), Image.Resampling.BICUBIC))
    mean, std = np.array(layout.mean, dtype=np.float32), np.array(layout.std, dtype=np.float32)
    rescaled = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    return ((rescaled - mean) / std).transpose(2, 0, 1)

"""From a picture to Qwen3-VL's patches: what Hugging Face's PIL image processor makes, for many images at once."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m4ov_kernels import pack_patches

# Qwen3-VL's processor configuration.
MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)


class ImageError(ValueError):
    """An image cannot be read; the message names it and says why."""


@dataclass(frozen=True)
class ImageGeometry:
    """How an image of fixed size becomes patches, and patches become tokens of the language model.

    Attributes:
        size: pixels a side.
        patch_size: pixels a side of one patch.
        temporal_patch_size: frames of one patch; an image is repeated.
        merge_size: patches a side that the merger makes one token of.
    """

    size: int
    patch_size: int
    merge_size: int
    temporal_patch_size: int = 2

    def __post_init__(self) -> None:
        if self.size % (self.patch_size * self.merge_size):
            raise ValueError(
                f"image size {self.size} is not a multiple of patch_size x merge_size = "
                f"{self.patch_size} x {self.merge_size}"
            )

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """Patches in time, height and width."""
        return (1, self.size // self.patch_size, self.size // self.patch_size)

    @property
    def patches(self) -> int:
        return (self.size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        return self.patches // self.merge_size**2


def read_image(path: Path) -> Image.Image:
    """An RGB image from a file.

    Raises:
        ImageError: the file is missing, truncated, damaged or not an image.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.verify()  # checksums; decoding alone lets a flipped bit through
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise ImageError(f"image {path}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"image {path}: cannot be read ({error})") from error


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """uint8 ``[size, size, 3]``; another size is resampled as the processor does it (bicubic)."""
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def patchify(images: np.ndarray, geometry: ImageGeometry) -> np.ndarray:
    """Normalised patches of square images, in the order in which the merger wants them.

    Args:
        images: uint8 ``[N, size, size, 3]``.

    Returns:
        float32 ``[N * patches, 3 * temporal_patch_size * patch_size²]``: the ``pixel_values`` of the Hugging Face
        processor, to the bit.
    """
    size = geometry.size
    if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3):
        raise ValueError(f"images must be uint8 [N, {size}, {size}, 3]; got {images.dtype} {list(images.shape)}")
    packed = pack_patches(
        list(images),
        patch_size=geometry.patch_size,
        temporal_patch_size=geometry.temporal_patch_size,
        merge_size=geometry.merge_size,
        image_mean=MEAN,
        image_std=STD,
        min_pixels=size**2,  # nothing is resized
        max_pixels=size**2,
        input_data_format="channels_last",
    )
    return packed.pixel_values.numpy()


def mirror(images: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Images ``[N, H, W, 3]`` with those where ``which`` ``[N]`` is true mirrored left to right."""
    return np.where(which[:, None, None, None], images[:, :, ::-1], images)


def shift(images: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Images ``[N, H, W, 3]`` moved by ``offsets`` ``[N, 2]`` (down, right) pixels; edge pixels fill the gap."""
    height, width = images.shape[1:3]
    rows = np.clip(np.arange(height) - offsets[:, :1], 0, height - 1)  # [N, H]
    columns = np.clip(np.arange(width) - offsets[:, 1:], 0, width - 1)
    return images[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]


def image_processor(geometry: ImageGeometry) -> Any:
    """Hugging Face's image processor with the same settings; needs PIL only."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    pixels = geometry.size**2
    return Qwen2VLImageProcessorPil(
        patch_size=geometry.patch_size,
        temporal_patch_size=geometry.temporal_patch_size,
        merge_size=geometry.merge_size,
        size={"shortest_edge": pixels, "longest_edge": pixels},
        image_mean=list(MEAN),
        image_std=list(STD),
    )


def stack(images: Sequence[np.ndarray], size: int) -> np.ndarray:
    """uint8 ``[N, size, size, 3]``, also for N = 0."""
    return np.stack(images) if images else np.zeros((0, size, size, 3), dtype=np.uint8)

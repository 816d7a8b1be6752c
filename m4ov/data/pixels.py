"""Images of any size as patches and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from m4ov.data.images import MEAN, STD, ImageError
from m4ov.data.pictures import load_image, named
from m4ov_kernels import pack_patches
from m4ov_kernels.packing import Patches
from m4ov_kernels.vision.pixels import image_size


@dataclass(frozen=True)
class PixelOptions:
    """How an image becomes patches and tokens; the names are :func:`m4ov_kernels.pack_patches`'s.

    Attributes:
        max_pixels: of a resized image; a record may ask for fewer (``meta.max_pixels``), never for more, and never for
            fewer than ``min_pixels``.
    """

    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    temporal_patch_size: int = 2
    image_mean: tuple[float, float, float] = MEAN
    image_std: tuple[float, float, float] = STD

    def __post_init__(self) -> None:
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise ValueError(f"min_pixels: expected 1 to max_pixels = {self.max_pixels}; got {self.min_pixels}")

    def budget(self, max_pixels: int | None) -> int:
        """The most pixels of an image of a sample that asks for ``max_pixels``."""
        return max(self.min_pixels, min(self.max_pixels, max_pixels or self.max_pixels))

    def tokens(self, height: int, width: int, budget: int) -> int:
        """Tokens of an image of that size, as many as :func:`pack_patches` makes features; nothing is resized.

        Raises:
            ImageError: it becomes smaller than one merged patch.
        """
        factor = self.patch_size * self.merge_size
        resized = image_size(height, width, factor, self.min_pixels, budget)
        if min(resized) < factor:
            raise ImageError(f"{height} x {width} (height x width) is resized to less than {factor} x {factor}")
        return resized[0] * resized[1] // factor**2

    def patches(self, images: Sequence[Image.Image], budget: int, dtype: torch.dtype) -> list[Patches]:
        """The patches of images that have the same budget, resized, normalised and in merge order."""
        packed = pack_patches(
            list(images),
            patch_size=self.patch_size,
            temporal_patch_size=self.temporal_patch_size,
            merge_size=self.merge_size,
            image_mean=self.image_mean,
            image_std=self.image_std,
            min_pixels=self.min_pixels,
            max_pixels=budget,
            dtype=dtype,
        )
        return Patches.split(packed.pixel_values, packed.grid_thw)


class Picture(NamedTuple):
    """An image that a record shows. ``max_pixels``: that it is given."""

    folder: Path
    reference: str
    max_pixels: int


def patches_of(
    pictures: Sequence[Picture], pixels: PixelOptions, dtype: torch.dtype, pool: ThreadPoolExecutor | None = None
) -> dict[Picture, Patches | ImageError]:
    """The patches of images, each once; or why there are none.

    Args:
        pool: its threads decode them; ``None``: this one does.
    """
    wanted = list(dict.fromkeys(pictures))
    found = map(_load, wanted) if pool is None else pool.map(_load, wanted)
    loaded = dict(zip(wanted, found, strict=True))
    made: dict[Picture, Patches | ImageError] = {
        picture: image for picture, image in loaded.items() if isinstance(image, ImageError)
    }
    for budget in sorted({picture.max_pixels for picture in wanted}):
        images = {
            picture: image
            for picture, image in loaded.items()
            if picture.max_pixels == budget and not isinstance(image, ImageError)
        }
        made |= _packed(images, budget, pixels, dtype)
    return made


def _load(picture: Picture) -> Image.Image | ImageError:
    try:
        return load_image(picture.reference, picture.folder)
    except ImageError as error:
        return error


def _packed(
    images: dict[Picture, Image.Image], budget: int, pixels: PixelOptions, dtype: torch.dtype
) -> dict[Picture, Patches | ImageError]:
    if not images:
        return {}
    try:
        return dict(zip(images, pixels.patches(list(images.values()), budget, dtype), strict=True))
    except ValueError as error:
        if len(images) == 1:
            (picture,) = images
            return {picture: ImageError(f"{named(picture.reference)}: {error}")}
    # One of them is broken; which, is seen one by one.
    parts = [_packed({picture: image}, budget, pixels, dtype) for picture, image in images.items()]
    return {picture: patches for part in parts for picture, patches in part.items()}

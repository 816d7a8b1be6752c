"""An image as the scorers look at it: a small copy in colour, and a larger one in grey."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from m4ov.data.density.record import DensityError

COLOUR_SIDE = 160  # pixels of the longer side, scaled up or down: regions are measured at one scale
GREY_SIDE, GREY_SCALE = (384, 1536), 0.75  # text is scaled down by so much, within these sides, and never up
MAX_PIXELS = 2**28


class Copies(NamedTuple):
    """``colour``: uint8 ``[h, w, 3]``; ``grey``: uint8 image; ``size``: width and height of the original."""

    colour: np.ndarray
    grey: Image.Image
    size: tuple[int, int]


def as_rgb(image: np.ndarray | Image.Image, name: str = "image") -> Image.Image:
    """An RGB image; what is transparent shows white.

    Args:
        image: uint8 ``[H, W]``, ``[H, W, 1]``, ``[H, W, 3]`` or ``[H, W, 4]`` (with opacity), or a PIL image.
        name: for messages.

    Raises:
        DensityError: it is another array, it has no pixel or more than 2^28, or its data is damaged.
    """
    if isinstance(image, np.ndarray):
        expected = f"{name}: expected uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
            raise DensityError(f"{expected}, got {image.dtype} {list(image.shape)}")
        _check_size(image.shape[1], image.shape[0], name)
        image = Image.fromarray(np.ascontiguousarray(image[:, :, 0] if image.shape[2:] == (1,) else image))
    elif not isinstance(image, Image.Image):
        raise DensityError(f"{name}: expected an array or a PIL image, got {type(image).__name__}")
    _check_size(*image.size, name)
    try:
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            opaque = Image.new("RGBA", image.size, "white")
            opaque.alpha_composite(image.convert("RGBA"))
            image = opaque
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DensityError(f"{name}: cannot be read ({error})") from error


def copies(rgb: Image.Image) -> Copies:
    """The two working copies. A resampling filter is symmetric, so a mirrored image has mirrored copies."""
    colour = rgb.resize(_scaled(rgb.size, COLOUR_SIDE), Image.Resampling.BILINEAR)
    least, most = GREY_SIDE
    side = min(max(least, round(GREY_SCALE * max(rgb.size))), most)
    grey = rgb.resize(_scaled(rgb.size, side), Image.Resampling.BILINEAR) if side < max(rgb.size) else rgb
    return Copies(np.asarray(colour), grey.convert("L"), rgb.size)


def _scaled(size: tuple[int, int], side: int) -> tuple[int, int]:
    longest = max(size)
    return max(1, round(size[0] * side / longest)), max(1, round(size[1] * side / longest))


def _check_size(width: int, height: int, name: str) -> None:
    if not 1 <= width * height <= MAX_PIXELS:
        raise DensityError(f"{name}: expected 1 to {MAX_PIXELS} pixels, got {width} x {height}")

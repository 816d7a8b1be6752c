"""Images of any kind as uint8 views ``[C, H, W]``: what Hugging Face's PIL processors read of them, without a copy.

``C`` is 3 (RGB), or 1 where all three would be the same.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from m4ov_kernels.checks import describe, refuse

OPERATOR = "pack_patches"
Pixels = np.ndarray | Tensor  # uint8 [C, H, W]; a Tensor only if it is on a GPU
# Pillow refuses to open files of more than twice its MAX_IMAGE_PIXELS: they are decompression bombs.
MAX_SOURCE_PIXELS = 2 * 89_478_485
_CHANNELS = (1, 3, 4)
_IMAGE = "a uint8 image [H, W, C] or [C, H, W] with 1, 3 or 4 channels"


def frames_of(entry: Any, name: str, input_data_format: str | None) -> tuple[list[Pixels], bool]:
    """The frames of one entry of ``images``, all of one size, and whether it is a video."""
    if isinstance(entry, (list, tuple)):
        if not entry:
            refuse(ValueError, OPERATOR, name, "an image, or the frames of a video", "an empty list")
        frames = [_pixels(frame, f"{name}[{i}]", input_data_format) for i, frame in enumerate(entry)]
        for i, frame in enumerate(frames):
            if frame.shape[1:] != frames[0].shape[1:]:
                size = "{} x {}".format(*frames[0].shape[1:])
                refuse(ValueError, OPERATOR, f"{name}[{i}]", f"{size} like the video's first frame", _size(frame))
        if len({frame.shape[0] for frame in frames}) > 1:  # some frames grey, some not
            frames = [_repeat(frame) for frame in frames]
        return frames, True
    if not isinstance(entry, (np.ndarray, Tensor)) or entry.ndim != 4:
        return [_pixels(entry, name, input_data_format)], False
    if not len(entry):
        refuse(ValueError, OPERATOR, name, "a video of at least one frame", _describe(entry))
    return [_pixels(frame, name, input_data_format) for frame in entry], True


def _pixels(image: Any, name: str, input_data_format: str | None) -> Pixels:
    if _is_pil(image):
        return _from_pil(image, name)
    if not isinstance(image, (np.ndarray, Tensor)):
        refuse(TypeError, OPERATOR, name, "a uint8 tensor, a uint8 NumPy array or a PIL image", describe(image))
    if image.dtype not in (torch.uint8, np.uint8):
        refuse(TypeError, OPERATOR, name, _IMAGE, _describe(image))
    if isinstance(image, Tensor):
        if image.layout is not torch.strided:
            refuse(TypeError, OPERATOR, name, "a dense (strided) tensor", f"layout {image.layout}")
        if image.device.type not in ("cpu", "cuda"):
            refuse(ValueError, OPERATOR, name, "on the CPU or a CUDA device", str(image.device))
        pixels: Pixels = image.numpy() if image.device.type == "cpu" else image
    else:
        pixels = image
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim != 3:
        refuse(ValueError, OPERATOR, name, _IMAGE, _describe(image))
    else:
        channels_first = pixels.shape[0] in _CHANNELS  # first, where both could be: as Hugging Face decides
        if input_data_format is not None:
            channels_first = input_data_format == "channels_first"
        if pixels.shape[0 if channels_first else 2] not in _CHANNELS:
            refuse(ValueError, OPERATOR, name, _IMAGE, _describe(image))
        if not channels_first:
            pixels = pixels.permute(2, 0, 1) if isinstance(pixels, Tensor) else pixels.transpose(2, 0, 1)
    check_size(pixels.shape[1], pixels.shape[2], name)
    return _without_alpha(pixels) if pixels.shape[0] == 4 else pixels


def check_size(height: int, width: int, name: str) -> None:
    """Refuse sizes that no picture has, before anything of that size is allocated or decoded."""
    if not height or not width:
        refuse(ValueError, OPERATOR, name, "an image of at least one pixel", f"{height} x {width} (height x width)")
    if max(height, width) > 200 * min(height, width):  # Hugging Face's limit
        expected = "an image with an aspect ratio of at most 200"
        refuse(ValueError, OPERATOR, name, expected, f"{height} x {width} (height x width)")
    if height * width > MAX_SOURCE_PIXELS:
        expected = f"an image of at most {MAX_SOURCE_PIXELS} pixels"
        refuse(ValueError, OPERATOR, name, expected, f"{height} x {width} (height x width)")


# ---- Alpha


def _without_alpha(pixels: Pixels) -> Pixels:
    """RGBA over white, ``[3, H, W]``, with the bits of transformers' float64 arithmetic."""
    table = _over_white()
    if isinstance(pixels, Tensor):
        blended = torch.from_numpy(table).to(pixels.device)[pixels[3:].int(), pixels[:3].int()]
        return blended.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    place = (pixels[3, :, :, None].astype(np.uint16) << 8) | pixels[:3].transpose(1, 2, 0)
    return np.take(table.reshape(-1), place).transpose(2, 0, 1)


@cache
def _over_white() -> np.ndarray:
    """uint8 ``[alpha, value]``."""
    alpha, value = np.arange(256)[:, None] / 255, np.arange(256)[None]
    return np.round(alpha * value + (1 - alpha) * 255).astype(np.uint8)


# ---- PIL


def _is_pil(image: Any) -> bool:
    module = sys.modules.get("PIL.Image")  # an image of Pillow's exists only where Pillow has been imported
    return module is not None and isinstance(image, module.Image)


def _from_pil(image: Any, name: str) -> np.ndarray:
    from PIL import Image

    check_size(image.height, image.width, name)
    try:
        transparent = "A" in image.getbands() or image.info.get("transparency") is not None
        if transparent:
            image = image.convert("RGBA")
            background = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(background, image)
        if image.mode not in ("RGB", "L"):
            image = image.convert("RGB")
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        message = f"{OPERATOR}: {name} cannot be decoded ({type(error).__name__}: {error})"
        raise ValueError(message) from error
    check_size(image.height, image.width, name)
    pixels = _memory_of(image)
    if pixels is None:
        pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


class _ArrowArray(ctypes.Structure):
    """The Arrow C data interface, https://arrow.apache.org/docs/format/CDataInterface.html."""


_ArrowArray._fields_ = [
    *((name, ctypes.c_int64) for name in ("length", "null_count", "offset", "n_buffers", "n_children")),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
    *((name, ctypes.c_void_p) for name in ("dictionary", "release", "private_data")),
]
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _memory_of(image: Any) -> np.ndarray | None:
    """Pillow's own memory of an RGB or L image, ``[H, W, 3]`` (of four bytes a pixel) or ``[H, W]``: a copy by way of
    NumPy takes longer than all of :func:`pack_patches`. ``None`` where Pillow (before 11.2, or with an image in
    several blocks) does not hand it out."""
    try:
        _, capsule = image.__arrow_c_array__()
    except (AttributeError, ValueError, OSError, MemoryError):
        return None
    array = _ArrowArray.from_address(_pointer_of(capsule, b"arrow_array"))
    pixel = 1
    if image.mode == "RGB":
        if array.n_children != 1 or array.children[0].contents.length != 4 * array.length:
            return None
        array, pixel = array.children[0].contents, 4
    count = image.height * image.width * pixel
    if array.length != count or array.offset or array.n_buffers != 2 or not array.buffers[1]:
        return None
    memory = (ctypes.c_uint8 * count).from_address(array.buffers[1])
    memory.owner = capsule  # lives as long as the views of the memory do
    pixels = np.frombuffer(memory, dtype=np.uint8)
    pixels.flags.writeable = False
    if pixel == 1:
        return pixels.reshape(image.height, image.width)
    return pixels.reshape(image.height, image.width, 4)[:, :, :3]


# ---- Words


def _repeat(pixels: Pixels) -> Pixels:
    if isinstance(pixels, Tensor):
        return pixels.expand(3, -1, -1)
    return np.broadcast_to(pixels, (3, *pixels.shape[1:]))


def _size(pixels: Pixels) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[2]} (height x width)"


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array {list(value.shape)}"
    return describe(value)


def refuse_small(name: str, height: int, width: int, factor: int) -> NoReturn:
    expected = f"an image that is resized to at least {factor} x {factor}, one merged patch (raise min_pixels)"
    refuse(ValueError, OPERATOR, name, expected, f"{height} x {width} (height x width)")


def same_device(images: Sequence[list[Pixels]]) -> torch.device:
    """The device of all frames; NumPy and PIL count as CPU."""
    devices = [[f.device if isinstance(f, Tensor) else torch.device("cpu") for f in frames] for frames in images]
    for i, of_image in enumerate(devices):
        for device in of_image:
            if device != devices[0][0]:
                refuse(ValueError, OPERATOR, f"images[{i}]", f"on {devices[0][0]} like images[0]", f"on {device}")
    return devices[0][0]

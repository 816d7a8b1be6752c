"""``pack_patches`` through the compiled kernels: C++ for CPU memory, CUDA C++ for a GPU's."""

from __future__ import annotations

import importlib.util
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.gpu import current_device
from m4ov_kernels.layout import DTYPES, output
from m4ov_kernels.vision.pixels_images import Pixels

if TYPE_CHECKING:
    from m4ov_kernels.vision.pixels import Clip, Layout

_FRACTION_BITS, _SPLIT_BITS = 22, 12  # as csrc/vision/bytes.h has them
# PackImage (csrc/vision/pack_patches.h), field by field.
_FIELDS = (
    *("source", "height", "width", "channels", "row", "pixel", "channel", "resized_height", "resized_width"),
    *("vertical", "horizontal", "vertical_window", "horizontal_window", "vertical_first"),
    *("first_patch", "slot", "copies", "first_strip", "between"),
)
_FEW_STRIPS, _MANY_STRIPS = 8, 32  # rows of patches in a strip, where images are few and where they are many


class Weights(NamedTuple):
    """How one side is resized: for each of its new pixels a row of ``table`` int32 ``[resized, 2 + 2 pairs]``: the
    first old pixel, the number of pairs of old pixels, and for each pair the low and high parts of its weights."""

    table: np.ndarray
    address: int


@lru_cache(maxsize=256)
def weights(size: int, resized: int) -> Weights:
    """Pillow's bicubic filter from ``size`` to ``resized`` pixels, in the float64 arithmetic of its ``Resample.c``."""
    scale = size / resized
    widening = max(scale, 1.0)
    support = 2.0 * widening
    center = (np.arange(resized) + 0.5) * scale
    start = np.maximum((center - support + 0.5).astype(np.int64), 0)
    count = np.minimum((center + support + 0.5).astype(np.int64), size) - start
    most = -(-int(count.max()) // 2) * 2
    values = np.zeros((resized, most))
    total = np.zeros(resized)
    for k in range(most):  # in order: sums of floats
        x = np.abs((k + start - center + 0.5) * (1.0 / widening))
        inner = (1.5 * x - 2.5) * x * x + 1
        outer = (((x - 5) * x + 8) * x - 4) * -0.5
        value = np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
        values[:, k] = np.where(k < count, value, 0.0)
        total += values[:, k]
    values /= np.where(total == 0, 1.0, total)[:, None]
    scaled = values * (1 << _FRACTION_BITS)
    whole = np.where(scaled < 0, scaled - 0.5, scaled + 0.5).astype(np.int64)
    low, high = whole & ((1 << _SPLIT_BITS) - 1), whole >> _SPLIT_BITS
    table = np.empty((resized, 2 + most), dtype=np.int32)
    table[:, 0], table[:, 1] = start, (count + 1) // 2
    for offset, part in ((2, low), (3, high)):
        table[:, offset::2] = (part[:, 0::2] & 0xFFFF) | (part[:, 1::2] << 16)
    return Weights(table, table.ctypes.data)


@cache
def _pillow_may_resize_rows_first() -> bool:
    """Since 13.0 Pillow resizes rows first where that saves much. Each pass rounds, so their order is in the bits."""
    if importlib.util.find_spec("PIL") is None:
        return True
    import PIL

    return int(PIL.__version__.split(".")[0]) >= 13


def _vertical_first(height: int, width: int, clip: Clip) -> bool:
    fewer_rows, fewer_columns = height - clip.height, width - clip.width
    return _pillow_may_resize_rows_first() and fewer_rows > 0 and fewer_rows > 2 * fewer_columns


def pack_patches_fwd(clips: list[Clip], layout: Layout, device: torch.device, *, out: Tensor | None = None) -> Tensor:
    """``pixel_values`` ``[N, C * t * p * p]``."""
    rows = sum(time * height * width for time, height, width in map(layout.grid, clips))
    fresh = out is None
    out = output(out, (rows, layout.patch_elements), torch.empty(0, device=device), layout.dtype)
    if not clips:
        return out
    if device.type == "cuda":
        _on_gpu(clips, layout, out)
        return out
    if fresh:
        _C.advise_huge_pages(out.data_ptr(), out.nbytes)
    threads = torch.get_num_threads()
    strip = _MANY_STRIPS if len(clips) >= 4 * threads else _FEW_STRIPS
    images, strips, keep = _images(clips, layout, strip)
    arguments = (len(images), rows, strips, strip, layout.patch_size, layout.temporal_patch_size, layout.merge_size)
    rest = (layout.mean, layout.std, DTYPES[layout.dtype], threads)
    each = _C.pack_patches(0, images.ctypes.data, *arguments, *rest, 0)
    scratch = torch.empty(each * min(threads, strips) + 64, dtype=torch.uint8)
    aligned = -(-scratch.data_ptr() // 64) * 64
    _C.pack_patches(out.data_ptr(), images.ctypes.data, *arguments, *rest, aligned)
    del keep
    return out


def _images(clips: list[Clip], layout: Layout, strip: int) -> tuple[np.ndarray, int, list[Any]]:
    """``PackImage`` of each frame (csrc/vision/pack_patches.h) as int64 rows, the number of strips, and what the
    addresses in them point to."""
    keep: list[Any] = []
    images = []
    patch = strips = 0
    for clip in clips:
        time, height, width = layout.grid(clip)
        for number, frame in enumerate(clip.frames):
            slot = number % layout.temporal_patch_size
            copies = layout.temporal_patch_size - slot if number == len(clip.frames) - 1 else 1
            pixels = _readable(frame)
            keep.append(pixels)
            first_patch = patch + number // layout.temporal_patch_size * height * width
            images.append((*_source(pixels), *_resizing(pixels, clip, keep), first_patch, slot, copies, strips, 0))
            strips += -(-height // strip)
        patch += time * height * width
    return np.array(images, dtype=np.int64), strips, keep


def _readable(pixels: Pixels) -> Pixels:
    """``pixels`` ``[C, H, W]`` as they are if the kernels can read them, else a copy."""
    channel, _, pixel = _strides(pixels)
    if pixel == 1 or (pixels.shape[0] == 3 and channel == 1 and pixel in (3, 4)):
        return pixels
    if isinstance(pixels, Tensor):
        return pixels.contiguous()
    return np.ascontiguousarray(pixels)


def _strides(pixels: Pixels) -> tuple[int, ...]:
    return tuple(pixels.stride() if isinstance(pixels, Tensor) else pixels.strides)


def _source(pixels: Pixels) -> tuple[int, ...]:
    address = pixels.data_ptr() if isinstance(pixels, Tensor) else pixels.__array_interface__["data"][0]
    channels, height, width = pixels.shape
    channel, row, pixel = _strides(pixels)
    return address, height, width, channels, row, pixel, channel


def _resizing(pixels: Pixels, clip: Clip, keep: list[Any]) -> tuple[int, ...]:
    height, width = pixels.shape[1:]
    rows = weights(height, clip.height) if height != clip.height else None
    columns = weights(width, clip.width) if width != clip.width else None
    keep += [rows, columns]
    return (
        *(clip.height, clip.width),
        *(rows.address if rows else 0, columns.address if columns else 0),
        *(rows.table.shape[1] if rows else 0, columns.table.shape[1] if columns else 0),
        int(_vertical_first(height, width, clip)),
    )


def _by_name(images: np.ndarray) -> dict[str, np.ndarray]:
    return {name: images[:, i] for i, name in enumerate(_FIELDS)}


def between_bytes(images: np.ndarray) -> np.ndarray:
    """Of each image, the bytes that the first of two directions makes; 0 where one is enough."""
    of = _by_name(images)
    rows_first, columns_first = of["resized_height"] * of["width"], of["height"] * of["resized_width"]
    size = np.where(of["vertical_first"] != 0, rows_first, columns_first) * of["channels"]
    return np.where((of["vertical"] != 0) & (of["horizontal"] != 0), size, 0)


def _on_gpu(clips: list[Clip], layout: Layout, out: Tensor) -> None:
    """One copy brings the descriptions of the images and the tables of weights to the device; nothing is waited for."""
    images, _, keep = _images(clips, layout, 1)
    size, sizes = _by_name(images), between_bytes(images)
    tables = {table.address: table.table for table in keep if isinstance(table, Weights)}
    places = np.cumsum([images.nbytes, *(table.nbytes for table in tables.values())])
    host = torch.empty(int(places[-1]), dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device=out.device)
    between = torch.empty(int(sizes.sum()), dtype=torch.uint8, device=out.device)
    moved = {0: 0} | {address: device.data_ptr() + int(place) for address, place in zip(tables, places, strict=False)}
    for name in ("vertical", "horizontal"):
        size[name][:] = [moved[address] for address in size[name].tolist()]
    size["between"][:] = between.data_ptr() + np.cumsum(sizes) - sizes
    packed = host.numpy()
    packed[: images.nbytes] = images.view(np.uint8).reshape(-1)
    for place, table in zip(places, tables.values(), strict=False):
        packed[place : place + table.nbytes] = table.view(np.uint8).reshape(-1)
    device.copy_(host, non_blocking=True)
    with current_device(out):
        _C.pack_patches_cuda(
            out.data_ptr(),
            device.data_ptr(),
            *(len(images), out.shape[0], between.numel()),
            *(layout.patch_size, layout.temporal_patch_size, layout.merge_size),
            *(layout.mean, layout.std, DTYPES[layout.dtype]),
            torch.cuda.current_stream().cuda_stream,
        )

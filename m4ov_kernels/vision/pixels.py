"""``pack_patches``: images of any sizes to one batch of a vision tower's patches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import checks, dispatch
from m4ov_kernels.vision import pixels_reference
from m4ov_kernels.vision.pixels_images import OPERATOR, Pixels, frames_of, refuse_small, same_device

_refuse = partial(checks.refuse, ValueError, OPERATOR)
_FORMATS = ("channels_first", "channels_last")
_MOST_PIXELS = 2**31  # of a resized image or video: 51 GB of float32


@dataclass(frozen=True)
class PackedPatches:
    """What a vision tower takes.

    Attributes:
        pixel_values: ``[N, C * temporal_patch_size * patch_size²]``, the patches of all images, each image's in merge
            order: the ``merge_size²`` patches that become one token follow each other.
        grid_thw: int64 ``[n, 3]``: patches of each image or video in time, height and width; on the CPU.
        cu_seqlens: int32 ``[sum of t + 1]``: where the patches of each frame begin, and N: within a frame the tower
            attends.
    """

    pixel_values: Tensor
    grid_thw: Tensor
    cu_seqlens: Tensor


@dataclass(frozen=True)
class Clip:
    """An image (one frame) or a video: uint8 views ``[C, H, W]``, and the size that they are resized to."""

    frames: list[Pixels]
    height: int
    width: int


@dataclass(frozen=True)
class Layout:
    """The options of :func:`pack_patches` that say what a patch is."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dtype: torch.dtype

    @property
    def patch_elements(self) -> int:
        return 3 * self.temporal_patch_size * self.patch_size**2

    def grid(self, clip: Clip) -> tuple[int, int, int]:
        """Patches of a clip in time, height and width."""
        time = -(-len(clip.frames) // self.temporal_patch_size)
        return time, clip.height // self.patch_size, clip.width // self.patch_size


def pack_patches(
    images: Sequence[Any],
    *,
    patch_size: int,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    image_mean: float | Iterable[float],
    image_std: float | Iterable[float],
    min_pixels: int,
    max_pixels: int,
    dtype: torch.dtype = torch.float32,
    input_data_format: str | None = None,
    video_budget: str = "video",
) -> PackedPatches:
    """Resizes, rescales, normalises and patchifies images, with the bits of Hugging Face's PIL image processor.

    An image is resized as Qwen2-VL and Qwen3-VL do it: both sides to multiples of ``patch_size * merge_size``, the area
    between ``min_pixels`` and ``max_pixels``, the aspect ratio kept as well as that allows, by Pillow's bicubic filter
    in eight bits. Then (x / 255 - mean) / std in float32.

    Args:
        images: each a uint8 tensor or NumPy array ``[H, W, C]``, ``[C, H, W]`` (C: 1, 3, or 4 with alpha, which is
            blended onto white) or ``[H, W]``, or a PIL image of any mode. A video is a uint8 tensor or array
            ``[F, H, W, C]`` or ``[F, C, H, W]`` or a list of images of one size; each frame is treated as an image is,
            and the last one is repeated until ``temporal_patch_size`` divides their number. Tensors may all be on one
            GPU; the result is there then. Nothing is copied where the layout allows (of RGB rows, of planes, of
            Pillow's memory).
        patch_size: pixels a side of one patch.
        temporal_patch_size: frames of one patch; an image fills all of them.
        merge_size: patches a side that the merger makes one token of.
        image_mean, image_std: of values from 0 to 1: three numbers for R, G and B, or one.
        min_pixels, max_pixels: of the resized image (``size["shortest_edge"]`` and ``size["longest_edge"]`` of the
            processor); for a video see ``video_budget``.
        dtype: of ``pixel_values``: float32; bfloat16 and float16 are the float32 values rounded.
        input_data_format: ``"channels_first"`` or ``"channels_last"`` of arrays and tensors. ``None``: the dimension
            that is 1, 3 or 4; the first, where both are.
        video_budget: what ``min_pixels`` and ``max_pixels`` bound: ``"video"``: all frames of a video together, as
            Qwen3-VL does; ``"frame"``: each frame, as Qwen2-VL and Qwen2.5-VL do.

    Returns:
        :class:`PackedPatches`. No gradients.

    Raises:
        TypeError: an entry of ``images`` is no image, or its dtype is not uint8.
        ValueError: an image cannot be decoded; it has no pixel, more than 178,956,970, an aspect ratio above 200 or
            other than 1, 3 or 4 channels; it becomes smaller than one merged patch; an option is out of range. The
            message names the option, or the image by its index.

    Source: transformers' ``image_processing_pil_qwen2_vl`` and ``video_processing_qwen3_vl``; Pillow's ``Resample.c``.
    """
    layout = _checked_layout(
        patch_size, temporal_patch_size, merge_size, image_mean, image_std, min_pixels, max_pixels, dtype
    )
    if input_data_format is not None:
        checks.one_of(OPERATOR, "input_data_format", input_data_format, _FORMATS)
    checks.one_of(OPERATOR, "video_budget", video_budget, ("video", "frame"))
    if not isinstance(images, (list, tuple)):
        checks.refuse(TypeError, OPERATOR, "images", "a list of images", checks.describe(images))
    clips = []
    for i, entry in enumerate(images):
        name = f"images[{i}]"
        frames, is_video = frames_of(entry, name, input_data_format)
        height, width = frames[0].shape[1:]
        factor = patch_size * merge_size
        if is_video and video_budget == "video":
            if len(frames) < temporal_patch_size:
                _refuse(name, f"a video of at least temporal_patch_size = {temporal_patch_size} frames", len(frames))
            area = video_size(len(frames), height, width, temporal_patch_size, factor, min_pixels, max_pixels)
        else:
            area = image_size(height, width, factor, min_pixels, max_pixels)
        if min(area) < factor:
            refuse_small(name, height, width, factor)
        if math.prod(area) * len(frames) > _MOST_PIXELS:
            got = f"{area[0]} x {area[1]}, {len(frames)} frames"
            _refuse(name, f"an image or video of at most {_MOST_PIXELS} pixels when it is resized", got)
        clips.append(Clip(frames, *area))
    device = same_device([clip.frames for clip in clips]) if clips else torch.device("cpu")
    grids = [layout.grid(clip) for clip in clips]
    lengths = [height * width for time, height, width in grids for _ in range(time)]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    if bounds[-1] > 2**31 - 1:
        _refuse("images", "fewer than 2^31 patches in all", int(bounds[-1]))
    return PackedPatches(
        _implementation(device)(clips, layout, device),
        torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        bounds.to(torch.int32).to(device),
    )


def image_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width after resizing, as Qwen2-VL's processor chooses them: multiples of ``factor``."""
    return _fit(height, width, factor, 1, 1, min_pixels, max_pixels)


def video_size(
    frames: int, height: int, width: int, temporal: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Height and width of each frame after resizing, as Qwen3-VL's processor chooses them: the pixels of all ``frames``
    count, rounded to multiples of ``temporal``."""
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    return _fit(height, width, factor, frames, round(frames / temporal) * temporal, min_pixels, max_pixels)


def _fit(
    height: int, width: int, factor: int, frames: int, counted_frames: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    size = [round(side / factor) * factor for side in (height, width)]
    pixels = counted_frames * size[0] * size[1]
    if pixels > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        size = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif pixels < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        size = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return size[0], size[1]


def _checked_layout(
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    image_mean: Any,
    image_std: Any,
    min_pixels: int,
    max_pixels: int,
    dtype: torch.dtype,
) -> Layout:
    sizes = {"patch_size": patch_size, "temporal_patch_size": temporal_patch_size, "merge_size": merge_size}
    for name, value in (*sizes.items(), ("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if isinstance(value, bool) or not isinstance(value, int):
            checks.refuse(TypeError, OPERATOR, name, "an integer", checks.describe(value))
        least, most = (0 if name == "min_pixels" else 1), (_MOST_PIXELS if name not in sizes else 256)
        if not least <= value <= most:
            _refuse(name, f"from {least} to {most}", value)
    if min_pixels > max_pixels:
        _refuse("min_pixels", f"at most max_pixels = {max_pixels}", min_pixels)
    mean, std = _three("image_mean", image_mean), _three("image_std", image_std)
    if min(std) < 1e-30:  # or quotients leave float32's range
        _refuse("image_std", "greater than 0 (at least 1e-30)", list(std))
    if dtype not in dispatch.KERNEL_DTYPES:
        _refuse("dtype", "torch.float32, torch.bfloat16 or torch.float16", dtype)
    return Layout(**sizes, mean=mean, std=std, dtype=dtype)


def _three(name: str, values: Any) -> tuple[float, float, float]:
    found = [values] * 3 if isinstance(values, (int, float)) else list(values) if isinstance(values, Iterable) else []
    if len(found) != 3 or not all(isinstance(value, (int, float)) for value in found):
        _refuse(name, "three numbers, or one", repr(values))
    if not all(math.isfinite(value) and abs(value) <= 1e30 for value in found):
        _refuse(name, "finite, up to 1e30", repr(values))
    return float(found[0]), float(found[1]), float(found[2])


def _implementation(device: torch.device) -> Any:
    """``native`` where it can serve the device, else the reference; what :func:`m4ov_kernels.backend` asks for."""
    wanted = dispatch.requested()
    reason = unavailable(device.type)
    if wanted not in (None, "reference", "native"):
        reason = f"it has no {wanted} kernels"
    if wanted not in (None, "reference") and reason:
        raise RuntimeError(f"{OPERATOR}: backend {wanted!r} was asked for, but {reason}")
    if wanted == "reference" or reason:
        return pixels_reference.pack_patches_fwd
    from m4ov_kernels.vision import pixels_native

    return pixels_native.pack_patches_fwd


def unavailable(device_type: str) -> str | None:
    """Why the compiled kernels cannot serve images on this kind of device; ``None`` if they can."""
    extension, reason = dispatch.native_extension()
    if extension is None:
        return reason
    if device_type == "cuda" and not extension.cuda_targets():
        return "the extension was built without CUDA (M4OV_CUDA)"
    return None

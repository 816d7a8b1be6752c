"""``interpolate_position_embeddings`` in Triton."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from m4ov_kernels import configs, device_errors
from m4ov_kernels.gpu import SIZES, Build, Work, current_device
from m4ov_kernels.layout import as_rows, output
from m4ov_kernels.vision.checks import count_patches, refuse_count, side_of

_OP = "interpolate_position_embeddings"


@triton.jit
def _taps(index, size, side):
    """The two places of the table around each index of an axis and their weights, rounded as Hugging Face rounds."""
    last = tl.cast(side - 1, tl.float32)
    x = tl.div_rn(index.to(tl.float32) * last, tl.maximum(size - 1, 1).to(tl.float32))
    low = tl.floor(x)
    distance = x - low
    first = tl.minimum(low.to(tl.int64), side - 1)
    return first, tl.minimum(first + 1, side - 1), 1.0 - distance, 1.0 - (1.0 - distance)


@triton.jit(do_not_specialize=["images", "patches", "steps"])
def _interpolate_fwd_kernel(
    table_ptr,  # [side · side, width]
    grid_ptr,  # int64 [images, 3]
    ends_ptr,  # int64 [images]: patches up to the end of an image
    flag_ptr,  # int64 [1]
    hidden_ptr,  # [patches, width], row stride given; or unused
    hidden_stride,
    out_ptr,  # [patches, width]
    images,
    patches,
    width,
    side,
    steps,  # halvings that find one of `images`
    MERGE: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    ROUND_TWICE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    program = tl.cast(tl.program_id(0), tl.int64)
    blocks = tl.cdiv(width, BLOCK_D)
    patch = (program // blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    # The first image that ends behind the patch.
    image = tl.zeros([BLOCK_ROWS], tl.int64)
    high = tl.zeros([BLOCK_ROWS], tl.int64) + images
    for _ in range(steps):
        middle = (image + high) // 2
        before = tl.load(ends_ptr + middle, mask=middle < images, other=(1 << 62)) <= patch
        image = tl.where(before, middle + 1, image)
        high = tl.where(before, high, middle)
    inside = image < images
    t = tl.load(grid_ptr + 3 * image, mask=inside, other=0)
    h = tl.load(grid_ptr + 3 * image + 1, mask=inside, other=0)
    w = tl.load(grid_ptr + 3 * image + 2, mask=inside, other=0)
    begin = tl.load(ends_ptr + image - 1, mask=inside & (image > 0), other=0)
    good = inside & (t > 0) & (h > 0) & (w > 0) & (h % MERGE == 0) & (w % MERGE == 0) & (patch >= begin)
    h = tl.where(good, h, MERGE)
    w = tl.where(good, w, MERGE)
    within = tl.where(good, patch - begin, 0) % (h * w)
    block = within // (MERGE * MERGE)
    rest = within % (MERGE * MERGE)
    across = w // MERGE
    y0, y1, wy0, wy1 = _taps(block // across * MERGE + rest // MERGE, h, side)
    x0, x1, wx0, wx1 = _taps(block % across * MERGE + rest % MERGE, w, side)
    mask = (patch < patches)[:, None] & (col < width)[None, :]
    table_ptr += col[None, :]
    total = tl.load(table_ptr + ((y0 * side + x0) * width)[:, None], mask=mask, other=0.0) * (wy0 * wx0)[:, None]
    total += tl.load(table_ptr + ((y0 * side + x1) * width)[:, None], mask=mask, other=0.0) * (wy0 * wx1)[:, None]
    total += tl.load(table_ptr + ((y1 * side + x0) * width)[:, None], mask=mask, other=0.0) * (wy1 * wx0)[:, None]
    total += tl.load(table_ptr + ((y1 * side + x1) * width)[:, None], mask=mask, other=0.0) * (wy1 * wx1)[:, None]
    if HAS_HIDDEN:
        if ROUND_TWICE:
            total = total.to(dtype).to(tl.float32)
        total += tl.load(hidden_ptr + patch[:, None] * hidden_stride + col[None, :], mask=mask, other=0.0)
    total = tl.where(good[:, None], total, float("nan"))
    tl.store(out_ptr + patch[:, None] * width + col[None, :], total.to(dtype), mask=mask)
    if program % blocks == 0:
        flags = flag_ptr + tl.zeros([BLOCK_ROWS], tl.int64)
        tl.atomic_min(flags, tl.maximum(tl.minimum(image, images - 1), 0), mask=(patch < patches) & (good == 0))
    if program == 0:
        last = tl.maximum(tl.cast(images, tl.int64) - 1, 0)
        total_patches = tl.load(ends_ptr + last, mask=images > 0, other=0)
        tl.atomic_min(flag_ptr, last, mask=total_patches != patches)


@triton.jit
def _first_of(low, size, side):
    """The first index of an axis whose lower place in the table is ``low`` or beyond."""
    found = (low * (size - 1) + side - 2) // tl.maximum(side - 1, 1)
    found = tl.where((low >= side) | (size == 1), size, found)
    return tl.where(low <= 0, 0, found)


@triton.jit
def _weight_of(index, size, side, cell):
    low, high, low_weight, high_weight = _taps(index, size, side)
    # In the table's last place both are the same, and the second weight is 0.
    return tl.where(low == cell, low_weight, 0.0) + tl.where(high == cell, high_weight, 0.0)


@triton.jit(do_not_specialize=["images", "patches"])
def _interpolate_bwd_kernel(
    grad_ptr,  # [patches, width], row stride given
    grad_stride,
    grid_ptr,  # int64 [images, 3]
    ends_ptr,  # int64 [images]
    grad_table_ptr,  # [side · side, width]
    images,
    patches,
    width,
    side,
    MERGE: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One place of the table, some columns: the weighted sum over the patches around it, image by image."""
    cell = tl.cast(tl.program_id(0), tl.int64)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = cell // side
    column = cell % side
    total = tl.zeros([BLOCK_PATCHES, BLOCK_D], tl.float32)
    fit = images >= 0
    for image in range(images):
        t = tl.load(grid_ptr + 3 * image)
        h = tl.load(grid_ptr + 3 * image + 1)
        w = tl.load(grid_ptr + 3 * image + 2)
        end = tl.load(ends_ptr + image)
        begin = end - t * h * w
        good = (t > 0) & (h > 0) & (w > 0) & (h % MERGE == 0) & (w % MERGE == 0) & (begin >= 0) & (end <= patches)
        fit = fit & good
        top = _first_of(row - 1, h, side)
        left = _first_of(column - 1, w, side)
        high = tl.maximum(_first_of(row + 1, h, side) - top, 1)
        wide = tl.maximum(_first_of(column + 1, w, side) - left, 1)
        some = good & (_first_of(row + 1, h, side) > top) & (_first_of(column + 1, w, side) > left)
        count = tl.where(some, t * high * wide, 0)
        for start in range(0, count, BLOCK_PATCHES):
            n = start + tl.arange(0, BLOCK_PATCHES)
            y = top + n // wide % high
            x = left + n % wide
            weight = _weight_of(y, h, side, row) * _weight_of(x, w, side, column)
            patch = begin + n // (wide * high) * h * w + y // MERGE * MERGE * w + y % MERGE * MERGE
            patch += x // MERGE * MERGE * MERGE + x % MERGE
            mask = (n < count)[:, None] & (col < width)[None, :]
            grad = tl.load(grad_ptr + patch[:, None] * grad_stride + col[None, :], mask=mask, other=0.0)
            total += tl.where(mask, grad * weight[:, None], 0.0)
    result = tl.where(fit, tl.sum(total, axis=0), float("nan"))
    tl.store(grad_table_ptr + cell * width + col, result.to(grad_table_ptr.dtype.element_ty), mask=col < width)


def _ends(grid_thw: Tensor) -> Tensor:
    return grid_thw.prod(dim=1).cumsum(0)


def interpolate_position_embeddings_fwd(
    table: Tensor,
    grid_thw: Tensor,
    hidden_states: Tensor | None,
    num_patches: int,
    merge_size: int,
    numerics: str,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The patches' position embeddings, plus ``hidden_states``; ``out``: contiguous, may be ``hidden_states``."""
    width, side = table.shape[1], side_of(_OP, table)
    result = output(out, (num_patches, width), table, table.dtype)
    if table.is_cuda and grid_thw.device.type == "cpu" and count_patches(_OP, grid_thw, merge_size) != num_patches:
        refuse_count(_OP, grid_thw, num_patches)
    if result.numel() == 0:
        return result
    ends = _ends(grid_thw).to(table.device, non_blocking=True)
    grid_thw = grid_thw.contiguous().to(table.device, non_blocking=True)
    images = grid_thw.shape[0]
    config = configs.get("interpolate_fwd", table, width)
    blocks = config.constexprs
    programs = triton.cdiv(num_patches, blocks["BLOCK_ROWS"]) * triton.cdiv(width, blocks["BLOCK_D"])
    with current_device(table):
        _interpolate_fwd_kernel[(programs,)](
            table.contiguous(),
            grid_thw,
            ends,
            device_errors.flag(table.device, _OP),
            *((result, width) if hidden_states is None else as_rows(hidden_states)),
            result,
            images,
            num_patches,
            width,
            side,
            images.bit_length(),
            MERGE=merge_size,
            HAS_HIDDEN=hidden_states is not None,
            ROUND_TWICE=numerics == "hf",
            **config.options(),
        )
    return result


def interpolate_position_embeddings_bwd(
    grad_output: Tensor, grid_thw: Tensor, table_rows: int, merge_size: int, *, out: Tensor | None = None
) -> Tensor:
    """The gradient of ``table``; that of ``hidden_states`` is ``grad_output``."""
    num_patches, width = grad_output.shape
    result = output(out, (table_rows, width), grad_output, grad_output.dtype)
    if result.numel() == 0:
        return result
    ends = _ends(grid_thw).to(grad_output.device, non_blocking=True)
    grid_thw = grid_thw.contiguous().to(grad_output.device, non_blocking=True)
    config = configs.get("interpolate_bwd", grad_output, width)
    with current_device(grad_output):
        _interpolate_bwd_kernel[(table_rows, triton.cdiv(width, config.constexprs["BLOCK_D"]))](
            *as_rows(grad_output),
            grid_thw,
            ends,
            result,
            grid_thw.shape[0],
            num_patches,
            width,
            math.isqrt(table_rows),
            MERGE=merge_size,
            **config.options(),
        )
    return result


_PATCHES, _SIDE = 16384, 48  # the problem of the cost model: four images of 64 x 64 patches, Qwen3-VL's table


def _declared() -> list[Build]:
    builds = []

    def declare(kernel: Any, dtype: str, signature: str, row: configs.Row, **rest: Any) -> None:
        config, flags = row.config, rest.pop("flags", {})
        constexprs = {"MERGE": 2, **flags, **config.constexprs}
        builds.append(Build(kernel, dtype, signature, constexprs, config.num_warps, config.num_stages, **rest))

    for dtype in SIZES:
        for row, targets in configs.shipped("interpolate_fwd", dtype):
            width = row.width or 1152
            signature = "*T/16 *i64/16 *i64/16 *i64/16 *T/16 i32/16 *T/16 i32 i32 i32/16 i32/16 i32"
            variants = [(True, True)]
            if dtype == "bf16" and row.width is None:
                variants += [(True, False), (False, True)]
            for hidden, twice in variants:
                flags = {"HAS_HIDDEN": hidden, "ROUND_TWICE": twice}
                moved = ((1 + hidden) * _PATCHES + _SIDE**2) * width * SIZES[dtype]
                work = Work(f"[{_PATCHES}, {width}]", moved, (7 + hidden) * _PATCHES * width)
                note = f"D {width}" + ("" if twice else ", fp32") + ("" if hidden else ", alone")
                rest = {"flags": flags, "note": note, "work": work, "targets": targets}
                declare(_interpolate_fwd_kernel, dtype, signature, row, **rest)
        for row, targets in configs.shipped("interpolate_bwd", dtype):
            width = row.width or 1152
            signature = "*T/16 i32/16 *i64/16 *i64/16 *T/16 i32 i32 i32/16 i32/16"
            moved = (_PATCHES + _SIDE**2) * width * SIZES[dtype]
            work = Work(f"[{_PATCHES}, {width}]", moved, 8 * _PATCHES * width)
            declare(_interpolate_bwd_kernel, dtype, signature, row, note=f"D {width}", work=work, targets=targets)
    return builds


KERNELS = _declared()

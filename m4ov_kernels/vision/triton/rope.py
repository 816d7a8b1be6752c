"""``vision_rope`` in Triton: one patch at a time, whose sines and cosines serve all of its heads, both ways."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from m4ov_kernels import configs, device_errors
from m4ov_kernels.gpu import SIZES, Build, Work, current_device
from m4ov_kernels.layout import as_heads, output
from m4ov_kernels.rope.frequencies import axial_tables
from m4ov_kernels.rope.triton.angles import _sin_cos


@triton.jit
def _patch_of(grid_ptr, images, merge, token, tokens, flag_ptr, BLOCK_IMAGES: tl.constexpr):
    """Row and column of a patch, int64; -1 where the grid is wrong or ends before it. The first program flags the first
    image whose size is wrong, or the last one where the grid does not make up so many tokens."""
    total = tl.zeros([], tl.int64)
    before, rows, columns = tl.zeros([], tl.int64), tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    wrong = tl.zeros([], tl.int64) + images
    for first in range(0, images, BLOCK_IMAGES):
        image = first + tl.arange(0, BLOCK_IMAGES)
        given = image < images
        size_ptr = grid_ptr + 3 * image
        f = tl.load(size_ptr, mask=given, other=0)
        h = tl.load(size_ptr + 1, mask=given, other=0)
        w = tl.load(size_ptr + 2, mask=given, other=0)
        bad = given & ((f <= 0) | (h <= 0) | (w <= 0) | (h % merge != 0) | (w % merge != 0))
        wrong = tl.minimum(wrong, tl.min(tl.where(bad, image, images), axis=0).to(tl.int64))
        count = tl.where(bad, 0, f * h * w)
        ends = total + tl.cumsum(count, axis=0)
        here = (token < ends) & (token >= ends - count)
        before += tl.sum(tl.where(here, ends - count, 0), axis=0)
        rows += tl.sum(tl.where(here, h, 0), axis=0)
        columns += tl.sum(tl.where(here, w, 0), axis=0)
        total += tl.sum(count, axis=0)
    if (token == 0) & ((wrong < images) | (total != tokens)):
        tl.atomic_min(flag_ptr, tl.minimum(wrong, tl.cast(images, tl.int64) - 1))
    found = (rows > 0) & (wrong == images)
    patch = (token - before) % tl.maximum(rows * columns, 1)
    inner, block, across = patch % (merge * merge), patch // (merge * merge), tl.maximum(columns // merge, 1)
    row, column = block // across * merge + inner // merge, block % across * merge + inner % merge
    return tl.where(found, row, -1), tl.where(found, column, -1)


@triton.jit
def _turn(x_ptr, head_stride, out_ptr, heads, dim, sine, cosine, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    half = dim // 2
    i = tl.arange(0, BLOCK_HALF)[None, :]
    sine, cosine = sine[None, :], cosine[None, :]
    for first in range(0, heads, BLOCK_HEADS):
        head = (first + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
        mask = (head < heads) & (i < half)
        a = tl.load(x_ptr + head * head_stride + i, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + head * head_stride + half + i, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + head * dim + i, (a * cosine - b * sine).to(dtype), mask=mask)
        tl.store(out_ptr + head * dim + half + i, (b * cosine + a * sine).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["token_stride", "axis_stride", "images", "tokens"])
def _vision_rope_kernel(
    q_ptr,  # [tokens, q_heads, dim], strides given
    q_token_stride,
    q_head_stride,
    q_out_ptr,  # [tokens, q_heads, dim]
    q_heads,
    k_ptr,  # likewise
    k_token_stride,
    k_head_stride,
    k_out_ptr,
    k_heads,
    source_ptr,  # the grid, int64 [images, 3], or positions, int32 or int64 [tokens, 2], strides given
    token_stride,
    axis_stride,
    images,
    merge,
    flag_ptr,  # int64 [1]
    single_ptr,  # fp32 [dim / 2]: inverse frequencies
    exact_ptr,  # int64 [dim / 2]: the same in turns of 2^-64
    axis_ptr,  # int32 [dim / 2]: 0 for rows, 1 for columns
    tokens,
    dim,
    EXACT: tl.constexpr,
    HAS_GRID: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_IMAGES: tl.constexpr,
):
    token = tl.cast(tl.program_id(0), tl.int64)
    i = tl.arange(0, BLOCK_HALF)
    inside = i < dim // 2
    if HAS_GRID:
        row, column = _patch_of(source_ptr, images, merge, token, tokens, flag_ptr, BLOCK_IMAGES)
    else:
        row = tl.load(source_ptr + token * token_stride).to(tl.int64)
        column = tl.load(source_ptr + token * token_stride + axis_stride).to(tl.int64)
    position = tl.where(tl.load(axis_ptr + i, mask=inside, other=0) == 0, row, column)
    sine, cosine = _sin_cos(position, single_ptr, exact_ptr, i, inside, EXACT)
    if HAS_GRID:
        sine = tl.where(row < 0, float("nan"), sine)
        cosine = tl.where(row < 0, float("nan"), cosine)
    if BACKWARD:
        sine = -sine
    q_ptr += token * q_token_stride
    q_out_ptr += token * q_heads * dim
    _turn(q_ptr, q_head_stride, q_out_ptr, q_heads, dim, sine, cosine, BLOCK_HEADS, BLOCK_HALF)
    k_ptr += token * k_token_stride
    k_out_ptr += token * k_heads * dim
    _turn(k_ptr, k_head_stride, k_out_ptr, k_heads, dim, sine, cosine, BLOCK_HEADS, BLOCK_HALF)


def vision_rope_fwd(
    q: Tensor,
    k: Tensor,
    grid_thw: Tensor | None,
    positions: Tensor | None,
    merge_size: int,
    theta: float,
    numerics: str,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(q, k)`` rotated; ``out``: contiguous, not overlapping an input."""
    return _launch(q, k, grid_thw, positions, merge_size, theta, numerics, False, out)


def vision_rope_bwd(
    grad_q: Tensor,
    grad_k: Tensor,
    grid_thw: Tensor | None,
    positions: Tensor | None,
    merge_size: int,
    theta: float,
    numerics: str,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(grad_q, grad_k)``: the gradients, rotated back."""
    return _launch(grad_q, grad_k, grid_thw, positions, merge_size, theta, numerics, True, out)


def _launch(
    q: Tensor,
    k: Tensor,
    grid_thw: Tensor | None,
    positions: Tensor | None,
    merge_size: int,
    theta: float,
    numerics: str,
    backward: bool,
    out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    tokens, dim = q.shape[0], q.shape[-1]
    results = tuple(output(out and out[i], x.shape, x, x.dtype) for i, x in enumerate((q, k)))
    if tokens == 0:
        return results  # type: ignore[return-value]
    operands: list[Any] = []
    for x, result in zip((q, k), results, strict=True):
        operands += [*as_heads(x), result, x.shape[-2]]
    if positions is not None:
        operands += [positions, *positions.stride(), 0, merge_size]
    else:
        assert grid_thw is not None
        operands += [grid_thw.long().contiguous(), 0, 0, grid_thw.shape[0], merge_size]
    tables = axial_tables(theta, dim, q.device)
    operands += [device_errors.flag(q.device, "vision_rope"), tables.single, tables.exact, tables.axis]
    config = configs.get("vision_rope", q, dim)
    flags = {"EXACT": numerics == "fp32", "HAS_GRID": positions is None, "BACKWARD": backward}
    with current_device(q):
        _vision_rope_kernel[(tokens,)](*operands, tokens, dim, **flags, **config.options())
    return results  # type: ignore[return-value]


_TOKENS, _HEADS = 16384, 16  # of the problems that the cost models state


def _declared() -> list[Build]:
    """Every row of the tables for every dtype, from a grid; the other ways at heads of up to 128."""
    builds = []
    for dtype in SIZES:
        for row, targets in configs.shipped("vision_rope", dtype):
            width, config = row.width or 0, row.config
            count = 2 * _TOKENS * _HEADS * width
            work = Work(f"[{_TOKENS}, {_HEADS} + {_HEADS}, {width}]", 2 * count * SIZES[dtype], 3 * count)
            ways = [(False, True, False)]
            if dtype == "bf16" and width == 128:
                ways += [(False, True, True), (True, True, False), (False, False, False)]
            for exact, grid, backward in ways:
                note = f"D {width}" + ", fp32" * exact + ", positions" * (not grid) + ", backward" * backward
                flags = {"EXACT": exact, "HAS_GRID": grid, "BACKWARD": backward, **config.constexprs}
                tensor = "*T/16 i32/16 i32/16 *T/16 i32"
                signature = f"{tensor} {tensor} *i64/16 i32 i32 i32 i32 *i64/16 *fp32/16 *i64/16 *i32/16 i32 i32/16"
                options: dict[str, Any] = {"hot": width <= 256, "note": note, "work": work, "targets": targets}
                warps = (config.num_warps, config.num_stages)
                builds.append(Build(_vision_rope_kernel, dtype, signature, flags, *warps, **options))
    return builds


KERNELS = _declared()

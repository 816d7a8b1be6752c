"""The Triton kernels of ``grouped_linear``; ``triton_grouped.py`` launches them.

How many rows an expert has is known to the device alone. Programs are started for the most tiles that there can be;
each finds its expert in the bounds, and those without a tile end. Where the bounds are wrong, all of the result is NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m4ov_kernels.dispatch import triton_interpreted

# Interpreted, a bfloat16 tl.dot is garbage: operands are widened there.
_WIDEN = tl.constexpr(triton_interpreted())


@triton.jit
def _bounds(offsets_ptr, experts, rows, flag_ptr, program, EXPERTS: tl.constexpr):
    """First row and end of every expert, and whether they are wrong: then the first of these is recorded, once."""
    expert = tl.arange(0, EXPERTS)
    first = tl.load(offsets_ptr + expert, mask=expert < experts, other=0)
    end = tl.load(offsets_ptr + expert + 1, mask=expert < experts, other=0)
    falling = end < first
    last = tl.load(offsets_ptr + experts)
    position = tl.min(tl.where(falling, expert + 1, 0x7FFFFFFF), axis=0)
    position = tl.where(tl.load(offsets_ptr) != 0, 0, position)
    position = tl.where((position == 0x7FFFFFFF) & (last != rows), experts, position)
    wrong = position != 0x7FFFFFFF
    if wrong & (program == 0):
        tl.atomic_min(flag_ptr, tl.cast(position, tl.int64))
    return expert, first, end, wrong


@triton.jit(do_not_specialize=["rows"])
def _grouped_linear_kernel(
    rows_ptr,  # [rows, width], row stride given
    rows_stride,
    weight_ptr,  # [experts, columns, width], or with ACROSS [experts, width, columns]; strides given
    weight_stride,
    expert_stride,
    offsets_ptr,  # int32 [experts + 1]
    out_ptr,  # [rows, columns]
    flag_ptr,  # int64 [1]
    rows,
    columns,
    width,
    experts,
    ACROSS: tl.constexpr,
    EXPERTS: tl.constexpr,  # rounded up to a power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    across = tl.cdiv(columns, BLOCK_N)
    tile = program // across
    expert, first, end, wrong = _bounds(offsets_ptr, experts, rows, flag_ptr, program, EXPERTS)
    tiles = tl.cdiv(end - first, BLOCK_M)
    before = tl.cumsum(tiles, axis=0) - tiles
    mine = (tile >= before) & (tile < before + tiles)
    begin = tl.sum(tl.where(mine, first + (tile - before) * BLOCK_M, 0), axis=0)
    stop = tl.sum(tl.where(mine, end, 0), axis=0)
    number = tl.sum(tl.where(mine, expert, 0), axis=0)
    if wrong:  # no memory is read by these bounds
        begin = tile * BLOCK_M
        stop = tl.minimum(begin + BLOCK_M, rows)
        number = 0
    if begin < stop:
        row = tl.cast(begin, tl.int64) + tl.arange(0, BLOCK_M)
        col = (program % across) * BLOCK_N + tl.arange(0, BLOCK_N)
        # Past the end the last row (of the weight, too) is repeated: what it makes is never stored. Not so along
        # memory, where the compiler would no longer see that neighbours lie together.
        left = rows_ptr + tl.minimum(row, stop - 1)[:, None] * rows_stride
        matrix = weight_ptr + tl.cast(number, tl.int64) * expert_stride
        if not ACROSS:
            matrix += tl.minimum(col, columns - 1)[None, :].to(tl.int64) * weight_stride
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, width, BLOCK_K):
            at = k + tl.arange(0, BLOCK_K)
            a = tl.load(left + at[None, :], mask=at[None, :] < width, other=0.0)
            if ACROSS:
                place = at[:, None].to(tl.int64) * weight_stride + col[None, :]
                b = tl.load(matrix + place, mask=(at[:, None] < width) & (col[None, :] < columns), other=0.0)
            else:
                b = tl.load(matrix + at[:, None], mask=at[:, None] < width, other=0.0)
            if _WIDEN:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision="ieee")
        total = tl.where(wrong, float("nan"), total)
        target = out_ptr + row[:, None] * columns + col[None, :]
        mask = (row < stop)[:, None] & (col < columns)[None, :]
        tl.store(target, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _grouped_linear_weight_kernel(
    grad_ptr,  # [rows, columns], row stride given
    grad_stride,
    rows_ptr,  # [rows, width], row stride given
    rows_stride,
    offsets_ptr,  # int32 [experts + 1]
    grad_weight_ptr,  # [experts, columns, width]
    flag_ptr,  # int64 [1]
    rows,
    columns,
    width,
    experts,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # of columns
    BLOCK_N: tl.constexpr,  # of width
    BLOCK_K: tl.constexpr,  # of rows, over which is summed
):
    program = tl.program_id(0)
    high, wide = tl.cdiv(columns, BLOCK_M), tl.cdiv(width, BLOCK_N)
    number = program // (high * wide)
    expert, firsts, ends, wrong = _bounds(offsets_ptr, experts, rows, flag_ptr, program, EXPERTS)
    first = tl.sum(tl.where(expert == number, firsts, 0), axis=0)
    end = tl.sum(tl.where(expert == number, ends, 0), axis=0)
    if wrong:
        end = first
    row = (program // wide % high) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = (program % wide) * BLOCK_N + tl.arange(0, BLOCK_N)
    left, right = grad_ptr + row[None, :], rows_ptr + col[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for token in range(first, end, BLOCK_K):
        at = tl.cast(token, tl.int64) + tl.arange(0, BLOCK_K)
        inside = (at < end)[:, None]
        a = tl.load(left + at[:, None] * grad_stride, mask=inside & (row < columns)[None, :], other=0.0)
        b = tl.load(right + at[:, None] * rows_stride, mask=inside & (col < width)[None, :], other=0.0)
        if _WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
    total = tl.where(wrong, float("nan"), total)
    place = (tl.cast(number, tl.int64) * columns + row[:, None]) * width + col[None, :]
    mask = (row < columns)[:, None] & (col < width)[None, :]
    tl.store(grad_weight_ptr + place, total.to(grad_weight_ptr.dtype.element_ty), mask=mask)

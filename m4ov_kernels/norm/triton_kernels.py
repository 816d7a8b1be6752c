"""The Triton kernels of ``rms_norm``; ``triton.py`` launches them.

A row of up to the widest whole-row configuration stays in registers: every input is read once. Wider rows are read
twice, in column blocks. The gradient of the weight is summed in two steps, per program over a fixed set of rows and
then over the programs in their order, so its bits depend on the shape alone.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _round(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def _scaled(x, rstd, weight, dtype: tl.constexpr, NUMERICS: tl.constexpr):
    """The normalised, weighted value in float32, rounded on the way where ``NUMERICS`` says so; 0 is hf."""
    if NUMERICS == 0:
        return _round(x * rstd, dtype) * weight
    else:
        return x * rstd * weight


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_fwd_kernel(
    hidden_ptr,  # [rows, width], row stride given
    hidden_stride,
    residual_ptr,  # likewise, or unused
    residual_stride,
    weight_ptr,  # [width]
    normed_ptr,  # [rows, width]
    total_ptr,  # [rows, width], or unused
    rstd_ptr,  # fp32 [rows]
    rows,
    width,
    eps,
    NUMERICS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype: tl.constexpr = normed_ptr.dtype.element_ty
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (col < width)[None, :]
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    x = tl.load(hidden_ptr + row[:, None] * hidden_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    place = row[:, None] * width + col[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + col[None, :], mask=mask, other=0.0)
        x += residual.to(tl.float32)
        tl.store(total_ptr + place, x.to(dtype), mask=mask)
        if NUMERICS != 2:
            x = _round(x, dtype)
    mean_square = tl.sum(x * x, axis=1) / tl.cast(width, tl.float32)
    rstd = tl.rsqrt(mean_square + tl.cast(eps, tl.float32))
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    normed = _scaled(x, rstd[:, None], weight[None, :], dtype, NUMERICS)
    tl.store(normed_ptr + place, normed.to(dtype), mask=mask)


@triton.jit
def _sum_at(hidden_ptr, residual_ptr, col, width, dtype: tl.constexpr, NUM: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    """``hidden + residual`` at these columns, unrounded, and as ``rms_norm`` normalises it."""
    x = tl.load(hidden_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    rounded = x
    if HAS_RESIDUAL and NUM != 2:
        rounded = _round(x, dtype)
    return x, rounded


@triton.jit
def _rms_norm_fwd_wide_kernel(
    hidden_ptr,
    hidden_stride,
    residual_ptr,
    residual_stride,
    weight_ptr,
    normed_ptr,
    total_ptr,
    rstd_ptr,
    width,
    eps,
    NUMERICS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row per program, in two passes over column blocks; arguments as in ``_rms_norm_fwd_kernel``."""
    dtype: tl.constexpr = normed_ptr.dtype.element_ty
    row = tl.cast(tl.program_id(0), tl.int64)
    hidden_ptr += row * hidden_stride
    residual_ptr += row * residual_stride
    normed_ptr += row * width
    total_ptr += row * width
    squares = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, width, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        total, x = _sum_at(hidden_ptr, residual_ptr, col, width, dtype, NUMERICS, HAS_RESIDUAL)
        squares += x * x
        if HAS_RESIDUAL:
            tl.store(total_ptr + col, total.to(dtype), mask=col < width)
    mean_square = tl.sum(squares, axis=0) / tl.cast(width, tl.float32)
    rstd = tl.rsqrt(mean_square + tl.cast(eps, tl.float32))
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, width, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        _, x = _sum_at(hidden_ptr, residual_ptr, col, width, dtype, NUMERICS, HAS_RESIDUAL)
        weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        tl.store(normed_ptr + col, _scaled(x, rstd, weight, dtype, NUMERICS).to(dtype), mask=col < width)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_bwd_kernel(
    grad_ptr,  # [rows, width], row stride given
    grad_stride,
    grad_total_ptr,  # likewise, or unused
    grad_total_stride,
    hidden_ptr,  # what was normalised, likewise
    hidden_stride,
    weight_ptr,  # [width]
    rstd_ptr,  # fp32 [rows]
    grad_hidden_ptr,  # [rows, width]
    partial_ptr,  # fp32 [programs, width], or unused
    rows,
    width,
    HAS_GRAD_TOTAL: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for block in range(program, tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & (col < width)[None, :]
        x = tl.load(hidden_ptr + row[:, None] * hidden_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        normed = x * rstd[:, None]
        if NEED_WEIGHT:
            grad_weight += grad * normed
        grad *= weight[None, :]
        mean = tl.sum(grad * normed, axis=1) / tl.cast(width, tl.float32)
        grad_hidden = (grad - normed * mean[:, None]) * rstd[:, None]
        if HAS_GRAD_TOTAL:
            place = row[:, None] * grad_total_stride + col[None, :]
            grad_hidden += tl.load(grad_total_ptr + place, mask=mask, other=0.0).to(tl.float32)
        place = row[:, None] * width + col[None, :]
        tl.store(grad_hidden_ptr + place, grad_hidden.to(grad_hidden_ptr.dtype.element_ty), mask=mask)
    if NEED_WEIGHT:
        partial = tl.sum(grad_weight, axis=0)
        tl.store(partial_ptr + tl.cast(program, tl.int64) * width + col, partial, mask=col < width)


@triton.jit
def _rms_norm_bwd_wide_kernel(
    grad_ptr,
    grad_stride,
    grad_total_ptr,
    grad_total_stride,
    hidden_ptr,
    hidden_stride,
    weight_ptr,
    rstd_ptr,
    grad_hidden_ptr,
    width,
    HAS_GRAD_TOTAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of one row per program, in two passes; arguments as in ``_rms_norm_bwd_kernel``."""
    row = tl.cast(tl.program_id(0), tl.int64)
    grad_ptr += row * grad_stride
    grad_total_ptr += row * grad_total_stride
    hidden_ptr += row * hidden_stride
    grad_hidden_ptr += row * width
    rstd = tl.load(rstd_ptr + row)
    products = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, width, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        x = tl.load(hidden_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        products += grad * weight * (x * rstd)
    mean = tl.sum(products, axis=0) / tl.cast(width, tl.float32)
    for start in range(0, width, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        x = tl.load(hidden_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        grad_hidden = (grad * weight - x * rstd * mean) * rstd
        if HAS_GRAD_TOTAL:
            grad_hidden += tl.load(grad_total_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        tl.store(grad_hidden_ptr + col, grad_hidden.to(grad_hidden_ptr.dtype.element_ty), mask=col < width)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_bwd_weight_kernel(
    grad_ptr,
    grad_stride,
    hidden_ptr,
    hidden_stride,
    rstd_ptr,
    partial_ptr,  # fp32 [programs of axis 0, width]
    rows,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The weight's partial gradients for wide rows: one block of columns, every n-th block of rows."""
    program = tl.program_id(0)
    col = tl.cast(tl.program_id(1), tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    grad_weight = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for block in range(program, tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & (col < width)[None, :]
        x = tl.load(hidden_ptr + row[:, None] * hidden_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        grad_weight += grad * (x * rstd[:, None])
    partial = tl.sum(grad_weight, axis=0)
    tl.store(partial_ptr + tl.cast(program, tl.int64) * width + col, partial, mask=col < width)


@triton.jit(do_not_specialize=["count"])
def _rms_norm_bwd_reduce_kernel(
    partial_ptr,  # fp32 [count, width]
    grad_weight_ptr,  # [width]
    count,
    width,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    col = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_PARTIALS, BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_PARTIALS):
        index = start + tl.arange(0, BLOCK_PARTIALS)
        mask = (index < count)[:, None] & (col < width)[None, :]
        total += tl.load(partial_ptr + tl.cast(index, tl.int64)[:, None] * width + col[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=0).to(grad_weight_ptr.dtype.element_ty)
    tl.store(grad_weight_ptr + col, result, mask=col < width)

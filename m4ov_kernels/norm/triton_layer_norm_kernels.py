"""The Triton kernels of ``layer_norm``; ``triton_layer_norm.py`` launches them.

As those of ``rms_norm``: whole rows in registers, wider ones in column blocks, the gradients of weight and bias summed
per program over a fixed set of rows and then over the programs. Means are sums of x/n, which cannot overflow, and the
variance a sum of squared distances to the mean.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _moments(x, mask, width, eps):
    """Mean, reciprocal root and distances to the mean (0 outside the mask) of rows ``[BLOCK_ROWS, BLOCK_D]``."""
    share = 1.0 / tl.cast(width, tl.float32)
    mean = tl.sum(x * share, axis=1)
    distance = tl.where(mask, x - mean[:, None], 0.0)
    shift = tl.sum(distance * share, axis=1)  # what rounding left out of the mean
    distance = tl.where(mask, distance - shift[:, None], 0.0)
    variance = tl.sum(distance * distance, axis=1) * share
    return mean + shift, tl.rsqrt(variance + tl.cast(eps, tl.float32)), distance


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_fwd_kernel(
    hidden_ptr,  # [rows, width], row stride given
    hidden_stride,
    residual_ptr,  # likewise, or unused
    residual_stride,
    weight_ptr,  # [width]
    bias_ptr,  # [width]
    normed_ptr,  # [rows, width]
    total_ptr,  # [rows, width], or unused
    mean_ptr,  # fp32 [rows]
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
    bias = tl.load(bias_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    x = tl.load(hidden_ptr + row[:, None] * hidden_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    place = row[:, None] * width + col[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + col[None, :], mask=mask, other=0.0)
        x += residual.to(tl.float32)
        rounded = x.to(dtype)
        tl.store(total_ptr + place, rounded, mask=mask)
        if NUMERICS != 2:
            x = rounded.to(tl.float32)
    mean, rstd, distance = _moments(x, mask, width, eps)
    normed = distance * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + place, normed.to(dtype), mask=mask)
    if HAS_RESIDUAL and NUMERICS == 2:  # the backward sees the sum rounded
        mean, rstd, distance = _moments(rounded.to(tl.float32), mask, width, eps)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def _wide_sum(hidden_ptr, residual_ptr, col, width, HAS_RESIDUAL: tl.constexpr):
    x = tl.load(hidden_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    return x


@triton.jit
def _wide_moments(
    hidden_ptr,
    residual_ptr,
    width,
    eps,
    dtype: tl.constexpr,
    ROUNDED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mean and reciprocal root of one row, in two passes over column blocks, of the rounded sum or of the sum."""
    share = 1.0 / tl.cast(width, tl.float32)
    sums = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, width, BLOCK_D):
        x = _wide_sum(hidden_ptr, residual_ptr, start + tl.arange(0, BLOCK_D), width, HAS_RESIDUAL)
        if ROUNDED:
            x = x.to(dtype).to(tl.float32)
        sums += x * share
    center = tl.sum(sums, axis=0)
    shifts = tl.zeros([BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, width, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        x = _wide_sum(hidden_ptr, residual_ptr, col, width, HAS_RESIDUAL)
        if ROUNDED:
            x = x.to(dtype).to(tl.float32)
        distance = tl.where(col < width, x - center, 0.0)
        shifts += distance * share
        squares += distance * distance
    shift = tl.sum(shifts, axis=0)
    variance = tl.maximum(tl.sum(squares, axis=0) * share - shift * shift, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return center, shift, tl.rsqrt(variance + tl.cast(eps, tl.float32))


@triton.jit
def _layer_norm_fwd_wide_kernel(
    hidden_ptr,
    hidden_stride,
    residual_ptr,
    residual_stride,
    weight_ptr,
    bias_ptr,
    normed_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    width,
    eps,
    NUMERICS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row per program; arguments as in ``_layer_norm_fwd_kernel``."""
    dtype: tl.constexpr = normed_ptr.dtype.element_ty
    ROUNDED: tl.constexpr = HAS_RESIDUAL and NUMERICS != 2
    row = tl.cast(tl.program_id(0), tl.int64)
    hidden_ptr += row * hidden_stride
    residual_ptr += row * residual_stride
    normed_ptr += row * width
    total_ptr += row * width
    center, shift, rstd = _wide_moments(hidden_ptr, residual_ptr, width, eps, dtype, ROUNDED, HAS_RESIDUAL, BLOCK_D)
    for start in range(0, width, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        x = _wide_sum(hidden_ptr, residual_ptr, col, width, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(total_ptr + col, x.to(dtype), mask=col < width)
        if ROUNDED:
            x = x.to(dtype).to(tl.float32)
        weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        normed = (x - center - shift) * rstd * weight + bias
        tl.store(normed_ptr + col, normed.to(dtype), mask=col < width)
    if HAS_RESIDUAL and NUMERICS == 2:  # the backward sees the sum rounded
        center, shift, rstd = _wide_moments(hidden_ptr, residual_ptr, width, eps, dtype, True, HAS_RESIDUAL, BLOCK_D)
    tl.store(mean_ptr + row, center + shift)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_bwd_kernel(
    grad_ptr,  # [rows, width], row stride given
    grad_stride,
    grad_total_ptr,  # likewise, or unused
    grad_total_stride,
    hidden_ptr,  # what was normalised, likewise
    hidden_stride,
    weight_ptr,  # [width]
    mean_ptr,  # fp32 [rows]
    rstd_ptr,  # fp32 [rows]
    grad_hidden_ptr,  # [rows, width]
    partial_ptr,  # fp32 [2, programs, width]: of the weight, of the bias; or unused
    rows,
    width,
    HAS_GRAD_TOTAL: tl.constexpr,
    NEED_PARAMETERS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    col = tl.arange(0, BLOCK_D)
    share = 1.0 / tl.cast(width, tl.float32)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for block in range(program, tl.cdiv(rows, BLOCK_ROWS), programs):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & (col < width)[None, :]
        x = tl.load(hidden_ptr + row[:, None] * hidden_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        normed = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        if NEED_PARAMETERS:
            grad_weight += grad * normed
            grad_bias += grad
        grad *= weight[None, :]
        mean_grad = tl.sum(grad, axis=1) * share
        mean_product = tl.sum(grad * normed, axis=1) * share
        grad_hidden = (grad - mean_grad[:, None] - normed * mean_product[:, None]) * rstd[:, None]
        if HAS_GRAD_TOTAL:
            place = row[:, None] * grad_total_stride + col[None, :]
            grad_hidden += tl.load(grad_total_ptr + place, mask=mask, other=0.0).to(tl.float32)
        place = row[:, None] * width + col[None, :]
        tl.store(grad_hidden_ptr + place, grad_hidden.to(grad_hidden_ptr.dtype.element_ty), mask=mask)
    if NEED_PARAMETERS:
        place = tl.cast(program, tl.int64) * width + col
        tl.store(partial_ptr + place, tl.sum(grad_weight, axis=0), mask=col < width)
        place += tl.cast(programs, tl.int64) * width
        tl.store(partial_ptr + place, tl.sum(grad_bias, axis=0), mask=col < width)


@triton.jit
def _layer_norm_bwd_wide_kernel(
    grad_ptr,
    grad_stride,
    grad_total_ptr,
    grad_total_stride,
    hidden_ptr,
    hidden_stride,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_hidden_ptr,
    width,
    HAS_GRAD_TOTAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of one row per program, in two passes; arguments as in ``_layer_norm_bwd_kernel``."""
    row = tl.cast(tl.program_id(0), tl.int64)
    grad_ptr += row * grad_stride
    grad_total_ptr += row * grad_total_stride
    hidden_ptr += row * hidden_stride
    grad_hidden_ptr += row * width
    share = 1.0 / tl.cast(width, tl.float32)
    mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
    sums = tl.zeros([BLOCK_D], tl.float32)
    products = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, width, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        x = tl.load(hidden_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        grad *= tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        sums += grad
        products += tl.where(col < width, grad * ((x - mean) * rstd), 0.0)
    mean_grad, mean_product = tl.sum(sums, axis=0) * share, tl.sum(products, axis=0) * share
    for start in range(0, width, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        x = tl.load(hidden_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        grad *= tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        grad_hidden = (grad - mean_grad - (x - mean) * rstd * mean_product) * rstd
        if HAS_GRAD_TOTAL:
            grad_hidden += tl.load(grad_total_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        tl.store(grad_hidden_ptr + col, grad_hidden.to(grad_hidden_ptr.dtype.element_ty), mask=col < width)


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_bwd_parameters_kernel(
    grad_ptr,
    grad_stride,
    hidden_ptr,
    hidden_stride,
    mean_ptr,
    rstd_ptr,
    partial_ptr,  # fp32 [2, programs of axis 0, width]
    rows,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The partial gradients of weight and bias for wide rows: one block of columns, every n-th block of rows."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    col = tl.cast(tl.program_id(1), tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    grad_weight = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for block in range(program, tl.cdiv(rows, BLOCK_ROWS), programs):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & (col < width)[None, :]
        x = tl.load(hidden_ptr + row[:, None] * hidden_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        grad_weight += tl.where(mask, grad * ((x - mean[:, None]) * rstd[:, None]), 0.0)
        grad_bias += grad
    place = tl.cast(program, tl.int64) * width + col
    tl.store(partial_ptr + place, tl.sum(grad_weight, axis=0), mask=col < width)
    place += tl.cast(programs, tl.int64) * width
    tl.store(partial_ptr + place, tl.sum(grad_bias, axis=0), mask=col < width)

"""The Triton kernel of ``quantized_linear`` for many rows and codes of eight bits on both sides, where tensor
descriptors load tiles (TMA).

Tokens are on the left here: of a tile's rows a thread holds two, and so two scales of activations, and the scale of a
block of weights is one number. Each program goes through ``PARTS`` tiles of weights with one of activations, in as
many accumulators: as many products for a byte from L2 as one large tile has, and registers left for one part's products
of 128 of K before their scales.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m4ov_kernels.gemm.triton_linear_kernels import _SWIGLU, _applied, _place

_FREE = ["scale_stride", "scale_step", "rows", "columns", "width"]
_BLOCK = tl.constexpr(128)  # of fp8


@triton.jit
def _promoted(total, x, weight, scale, x_scale, SCALED: tl.constexpr):
    """``total`` and the products of one step of K, in a sum of their own first, as Hopper's units keep fewer bits of
    one than float32 has; int8's are exact."""
    if SCALED:
        part = tl.dot(x, weight) * x_scale[:, None]
        return tl.fma(part, tl.zeros_like(part) + scale, total)
    elif total.dtype == tl.int32:
        return tl.dot(x, weight, total, out_dtype=tl.int32)
    else:
        return total + tl.dot(x, weight)


@triton.jit
def _stored(
    total,
    out,
    residual,
    m,
    n,
    columns,
    bias_ptr,
    up,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    BLOCK_N: tl.constexpr = total.shape[1]
    feature = n + tl.arange(0, BLOCK_N)
    if EPILOGUE == _SWIGLU:
        if HAS_BIAS:
            total += tl.load(bias_ptr + feature, mask=feature < columns // 2, other=0.0).to(tl.float32)[None, :]
            feature += columns // 2
            up += tl.load(bias_ptr + feature, mask=feature < columns, other=0.0).to(tl.float32)[None, :]
    elif HAS_BIAS:
        total += tl.load(bias_ptr + feature, mask=feature < columns, other=0.0).to(tl.float32)[None, :]
    total = _applied(total, up, EPILOGUE)
    if HAS_RESIDUAL:
        total += residual.load([m, n]).to(tl.float32)
    out.store([m, n], total.to(out.dtype))


@triton.jit
def _finished(total, row_scale, scale_ptr, scale_stride, n, columns, SCALED: tl.constexpr, BLOCK_N: tl.constexpr):
    if not SCALED:
        number = tl.minimum(n + tl.arange(0, BLOCK_N), columns - 1)
        scale = tl.load(scale_ptr + number * tl.cast(scale_stride, tl.int64)).to(tl.float32)
        total = total.to(tl.float32) * row_scale[:, None] * scale[None, :]
    return total


@triton.jit(do_not_specialize=_FREE)
def _quantized_linear_large_fwd_kernel(
    x,  # int8 or e4m3 [rows, width]: a descriptor of blocks [BLOCK_M, BLOCK_K]
    x_scale_ptr,  # fp32 [1, rows], or with X_GROUPED one for each 128 of K [steps, rows]
    weight,  # likewise [columns, width]: a descriptor of blocks [BLOCK_N, BLOCK_K]
    scale_ptr,  # of a weight row, or with SCALED of a block of 128 × 128
    scale_stride,
    scale_step,
    bias_ptr,  # [columns], or unused
    residual,  # as the result, or unused
    out,  # [rows, features]: a descriptor of blocks [BLOCK_M, BLOCK_N]
    rows,
    columns,
    width,
    INTEGER: tl.constexpr,
    SCALED: tl.constexpr,
    X_GROUPED: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,  # tiles of weights: 2 or 4
    GROUP: tl.constexpr,
):
    pair: tl.constexpr = EPILOGUE == _SWIGLU
    tile: tl.constexpr = (PARTS // 2 if pair else PARTS) * BLOCK_N
    features = columns // 2 if pair else columns
    # The second half of the parts; without pairs beside the first.
    apart = features if pair else PARTS // 2 * BLOCK_N
    sums: tl.constexpr = tl.int32 if INTEGER else tl.float32
    blocks_n, blocks_m = tl.cdiv(features, tile), tl.cdiv(rows, BLOCK_M)
    steps = tl.cdiv(width, BLOCK_K)
    tl.assume(steps > 0)  # else the loops around would be compiled twice
    for unit in tl.range(tl.program_id(0), blocks_n * blocks_m, tl.num_programs(0), flatten=True):
        block_n, block_m = _place(unit, blocks_n, blocks_m, GROUP)
        n, m = block_n * tile, block_m * BLOCK_M
        x_scales = x_scale_ptr + tl.minimum(m + tl.arange(0, BLOCK_M), rows - 1)
        # Past the end: rows that are never stored. Two parts of 64 are in one block of scales.
        scales = scale_ptr + (n // _BLOCK) * scale_stride
        other_scales = scale_ptr + (tl.minimum(n + apart, columns - 1) // _BLOCK) * scale_stride
        first = tl.zeros([BLOCK_M, BLOCK_N], sums)
        second = tl.zeros([BLOCK_M, BLOCK_N], sums)
        third = tl.zeros([BLOCK_M, BLOCK_N], sums)
        fourth = tl.zeros([BLOCK_M, BLOCK_N], sums)
        x_scale = tl.load(x_scales)
        for step in range(steps):
            scale, other_scale = 0.0, 0.0
            if SCALED:  # asked for before the products, which take longer
                scale = tl.load(scales + step * scale_step).to(tl.float32)
                other_scale = tl.load(other_scales + step * scale_step).to(tl.float32)
            of_step = x_scale
            if X_GROUPED:
                of_step = tl.load(x_scales + step * tl.cast(rows, tl.int64))
            k = step * BLOCK_K
            a = x.load([m, k])
            first = _promoted(first, a, weight.load([n, k]).T, scale, of_step, SCALED)
            if PARTS == 4:
                second = _promoted(second, a, weight.load([n + BLOCK_N, k]).T, scale, of_step, SCALED)
            third = _promoted(third, a, weight.load([n + apart, k]).T, other_scale, of_step, SCALED)
            if PARTS == 4:
                fourth = _promoted(fourth, a, weight.load([n + apart + BLOCK_N, k]).T, other_scale, of_step, SCALED)
        for part in tl.static_range(PARTS // 2):
            at = n + part * BLOCK_N
            low, high = (first, third) if part == 0 else (second, fourth)
            low = _finished(low, x_scale, scale_ptr, scale_stride, at, columns, SCALED, BLOCK_N)
            if pair:
                high = _finished(high, x_scale, scale_ptr, scale_stride, at + apart, columns, SCALED, BLOCK_N)
            _stored(low, out, residual, m, at, columns, bias_ptr, high, EPILOGUE, HAS_BIAS, HAS_RESIDUAL)
            if not pair:
                at += apart
                high = _finished(high, x_scale, scale_ptr, scale_stride, at, columns, SCALED, BLOCK_N)
                _stored(high, out, residual, m, at, columns, bias_ptr, high, EPILOGUE, HAS_BIAS, HAS_RESIDUAL)

"""The Triton kernels around the product of ``quantized_linear``: activations become codes, weights become values."""

from __future__ import annotations

import triton
import triton.language as tl

from m4ov_kernels.gemm.triton_linear_tiles import INT4, INT8
from m4ov_kernels.gemm.triton_quantize_kernels import _codes, _finite, _scale

_BLOCK = tl.constexpr(128)


@triton.jit(do_not_specialize=["input_stride", "rows", "width"])
def _quantized_linear_input_kernel(
    input_ptr,  # [rows, width]
    input_stride,
    static_ptr,  # the scale of a static quantisation, or unused
    codes_ptr,  # int8, or uint8 of e4m3: [rows, width]
    scales_ptr,  # fp32 [groups, rows]: of a row one group, or with GROUPED one for 128 of it
    rows,
    width,
    FLOAT8: tl.constexpr,
    GROUPED: tl.constexpr,
    STATIC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A row's codes and scales, as ``quantize_int8`` and ``quantize_fp8`` define them; with STATIC the given scale, but
    NaN in a row with a NaN."""
    row = tl.cast(tl.program_id(0), tl.int64)
    source = input_ptr + row * input_stride
    sink = codes_ptr + row * width
    if GROUPED:
        groups: tl.constexpr = BLOCK_D // _BLOCK
        for start in range(0, width, BLOCK_D):
            col = start + tl.arange(0, groups)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
            x = tl.load(source + col, mask=col < width, other=0.0).to(tl.float32)
            magnitude, bad = _finite(tl.abs(x))
            good = tl.max(bad, axis=1) == 0
            scale = _scale(tl.max(magnitude, axis=1), FLOAT8)
            codes = _codes(x, scale[:, None], good[:, None], FLOAT8)
            tl.store(sink + col, codes.to(codes_ptr.dtype.element_ty), mask=col < width)
            group = start // _BLOCK + tl.arange(0, groups)
            to = scales_ptr + tl.cast(group, tl.int64) * rows + row
            tl.store(to, tl.where(good, scale, float("nan")), mask=group * _BLOCK < width)
    else:
        if STATIC:
            scale = tl.load(static_ptr).to(tl.float32)
        most = tl.zeros([BLOCK_D], tl.float32)
        bad = tl.zeros([BLOCK_D], tl.int32)
        for start in range(0, width, BLOCK_D):
            col = start + tl.arange(0, BLOCK_D)
            x = tl.load(source + col, mask=col < width, other=0.0).to(tl.float32)
            if STATIC:
                x = tl.where(col < width, tl.div_rn(x, tl.zeros_like(x) + scale), 0.0)
                bad |= (x != x).to(tl.int32)
            else:
                magnitude, not_finite = _finite(tl.abs(x))
                most, bad = tl.maximum(most, magnitude), tl.maximum(bad, not_finite)
        good = tl.max(bad, axis=0) == 0
        if not STATIC:
            scale = _scale(tl.max(most, axis=0), FLOAT8)
        for start in range(0, width, BLOCK_D):  # again, out of a cache
            col = start + tl.arange(0, BLOCK_D)
            x = tl.load(source + col, mask=col < width, other=0.0).to(tl.float32)
            codes = _codes(x, scale, good, FLOAT8, STATIC)
            tl.store(sink + col, codes.to(codes_ptr.dtype.element_ty), mask=col < width)
        tl.store(scales_ptr + row, tl.where(good, scale, float("nan")))


@triton.jit(do_not_specialize=["weight_stride", "scale_stride", "columns", "width", "first", "out_stride", "group"])
def _quantized_linear_dequantize_kernel(
    weight_ptr,  # canonical codes [columns, ...]: int4 bytes of two, int8, or uint8 of e4m3
    weight_stride,
    scale_ptr,  # [columns (or one for SCALE_ROWS of them), groups]
    scale_stride,
    zero_ptr,  # uint8, laid out as the scales, or unused
    group_ptr,  # int32 [K]: of each input feature, or unused
    out_ptr,  # [columns, out_stride]: input features from `first` on
    out_stride,
    columns,
    width,  # input features wanted
    first,
    group,  # input features of a scale
    KIND: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    ZEROS: tl.constexpr,
    ORDERED: tl.constexpr,
    LARGEST: tl.constexpr,  # of the result's dtype: what is finite stays so
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK_D)
    program = tl.program_id(0)
    number = tl.cast(program // blocks, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    place = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    k = first + place
    inside = (number < columns)[:, None] & (place < width)[None, :]
    if ORDERED:
        of = tl.load(group_ptr + k, mask=place < width, other=0)[None, :]
    else:
        of = (k // group)[None, :]
    at = (number // SCALE_ROWS)[:, None] * scale_stride + of
    line = weight_ptr + number[:, None] * weight_stride
    if KIND == INT4:
        packed = tl.load(line + (k // 2)[None, :], mask=inside, other=0).to(tl.int32)
        q = (packed >> (4 * (k % 2))[None, :]) & 15
        if ZEROS:
            q -= tl.load(zero_ptr + at, mask=inside, other=0).to(tl.int32)
        else:
            q -= 8
        value = q.to(tl.float32)
    elif KIND == INT8:
        value = tl.load(line + k[None, :], mask=inside, other=0).to(tl.float32)
    else:
        bits = tl.load(line + k[None, :], mask=inside, other=0).to(tl.int32)
        value = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    value *= tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.minimum(tl.maximum(value, -LARGEST), LARGEST)
    to = out_ptr + number[:, None] * out_stride + place[None, :]
    tl.store(to, value.to(out_ptr.dtype.element_ty), mask=inside)

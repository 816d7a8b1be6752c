"""The Triton kernels of the quantisations of activations; ``triton_quantize.py`` launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from m4ov_kernels.activation.triton_kernels import _activate

_LEAST = tl.constexpr(1.1754943508222875e-38)  # 2⁻¹²⁶, float32's smallest normal number
_MOST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _e4m3(x):
    """The bits of x, of at most 464 in magnitude, rounded to e4m3, half to even. Beside 2^(20 + its exponent), or that
    of the smallest normal e4m3, its four bits end a float32; 152 makes up for the difference of the biases."""
    bits = x.to(tl.int32, bitcast=True)
    unit = ((bits & 0x7F800000) + 0x0A000098).to(tl.float32, bitcast=True)
    beside = tl.maximum(unit, 16384.296875)
    total = (tl.abs(x) + beside).to(tl.int32, bitcast=True)
    return (((total + (total >> 20)) & 0x7F) | ((bits >> 24) & 0x80)).to(tl.int8)


@triton.jit
def _integer(x):
    """x of at most 127 in magnitude, rounded to nearest, half to even: beside 1.5 · 2²³ the last place is 1."""
    return ((x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)


@triton.jit
def _scale(most, FLOAT8: tl.constexpr):
    largest: tl.constexpr = 448.0 if FLOAT8 else 127.0
    return tl.maximum(tl.div_rn(most, tl.zeros_like(most) + largest), _LEAST)


@triton.jit
def _codes(x, scale, good, FLOAT8: tl.constexpr, CLAMPED: tl.constexpr = False):
    """int8, or the bits of e4m3; of 0 where x is not good. CLAMPED: to what e4m3 has, else x fits."""
    scaled = tl.where(good, tl.div_rn(x, tl.zeros_like(x) + scale), 0.0)
    if CLAMPED:
        scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
    if FLOAT8:
        return _e4m3(scaled)
    else:
        return _integer(scaled)


@triton.jit
def _finite(magnitude):
    """Magnitudes with 0 for what is not finite, and 1 where there is such."""
    finite = magnitude <= _MOST
    return tl.where(finite, magnitude, 0.0), tl.where(finite, 0, 1)


@triton.jit(do_not_specialize=["rows"])
def _quantize_tiles_kernel(
    input_ptr,  # [rows, width], row stride given
    input_stride,
    codes_ptr,  # int8, or the bits of e4m3: [rows, width]
    turned_ptr,  # [width, rows], or unused
    scales_ptr,  # fp32 [rows, tiles across], of BLOCKS [tiles down, tiles across]
    rows,
    width,
    FLOAT8: tl.constexpr,
    BLOCKS: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What a tile holds of a row, or with BLOCKS the tile, shares a scale."""
    across = tl.cdiv(width, BLOCK_D)
    program = tl.program_id(0)
    down, right = program // across, program % across
    row = tl.cast(down, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.cast(right, tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (col < width)[None, :]
    x = tl.load(input_ptr + row[:, None] * input_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    magnitude, bad = _finite(tl.abs(x))
    most, bad = tl.max(magnitude, axis=1), tl.max(bad, axis=1)
    if BLOCKS:  # of all rows
        most = tl.zeros_like(most) + tl.max(most, axis=0)
        bad = tl.zeros_like(bad) + tl.max(bad, axis=0)
    scale = _scale(most, FLOAT8)
    codes = _codes(x, scale[:, None], bad[:, None] == 0, FLOAT8)
    tl.store(codes_ptr + row[:, None] * width + col[None, :], codes, mask=mask)
    if TURNED:
        tl.store(turned_ptr + col[None, :] * rows + row[:, None], codes, mask=mask)
    told = tl.where(bad == 0, scale, float("nan"))
    if BLOCKS:
        first = tl.arange(0, BLOCK_ROWS) == 0
        tl.store(scales_ptr + tl.cast(down, tl.int64) * across + right + row * 0, told, mask=first)
    else:
        tl.store(scales_ptr + row * across + right, told, mask=row < rows)


@triton.jit
def _quantize_wide_kernel(
    input_ptr, input_stride, codes_ptr, scales_ptr, width, FLOAT8: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One row a program, in two passes over blocks of columns; arguments as in ``_quantize_tiles_kernel``."""
    row = tl.cast(tl.program_id(0), tl.int64)
    input_ptr += row * input_stride
    codes_ptr += row * width
    most, bad = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.int32)
    for start in range(0, width, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        x = tl.load(input_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        magnitude, not_finite = _finite(tl.abs(x))
        most, bad = tl.maximum(most, magnitude), tl.maximum(bad, not_finite)
    good = tl.max(bad, axis=0) == 0
    scale = _scale(tl.zeros([1], tl.float32) + tl.max(most, axis=0), FLOAT8)
    for start in range(0, width, BLOCK_D):  # again, out of a cache
        col = start + tl.arange(0, BLOCK_D)
        x = tl.load(input_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        tl.store(codes_ptr + col, _codes(x, scale, good, FLOAT8), mask=col < width)
    tl.store(scales_ptr + row + tl.arange(0, 1), tl.where(good, scale, float("nan")))


@triton.jit(do_not_specialize=["rows"])
def _swiglu_quantize_kernel(
    gate_ptr,  # [rows, width], row stride given
    gate_stride,
    up_ptr,  # likewise
    up_stride,
    codes_ptr,  # int8, or the bits of e4m3: [rows, width]
    scales_ptr,  # fp32 [rows]
    rows,
    width,
    NUMERICS: tl.constexpr,
    FLOAT8: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Whole rows of ``_gated_fwd_kernel`` of the activations, then of ``_quantize_tiles_kernel``."""
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (col < width)[None, :]
    gate = tl.load(gate_ptr + row[:, None] * gate_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row[:, None] * up_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    activated = _activate(gate, 0)
    if NUMERICS != 2:
        activated = activated.to(dtype).to(tl.float32)
    x = (activated * up).to(dtype).to(tl.float32)
    magnitude, bad = _finite(tl.abs(x))
    most, bad = tl.max(magnitude, axis=1), tl.max(bad, axis=1)
    scale = _scale(most, FLOAT8)
    codes = _codes(x, scale[:, None], bad[:, None] == 0, FLOAT8)
    tl.store(codes_ptr + row[:, None] * width + col[None, :], codes, mask=mask)
    tl.store(scales_ptr + row, tl.where(bad == 0, scale, float("nan")), mask=row < rows)

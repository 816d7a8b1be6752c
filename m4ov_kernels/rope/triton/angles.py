"""Sines and cosines of large angles in Triton, without float64, which GPUs have little of or none.

An angle is reduced as a fraction of a turn, a 64-bit integer in units of 2^-64 that wraps as angles do. What is left of
it, at most an eighth of a turn, becomes two float32 numbers, which two short polynomials take to within one unit in the
last place. No step needs a fused multiply and add, so the interpreter computes the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _turns(angle):
    """The turns of an angle from 0 to 2^31, float32, of at least 2^-2: exact to 2^-56 and better below 2^24."""
    bits = angle.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x800000).to(tl.int64)
    right = (150 - (bits >> 23)).to(tl.int64)  # angle = mantissa · 2^-right
    right = tl.minimum(tl.maximum(right, -8), 31)
    # 1 / 2π = 0x28be60db9391054a7f09d5f4 · 2^-96
    low = mantissa * 0x9391054A + ((mantissa * 0x7F09D5F4) >> 32)
    low = tl.where(right >= 0, low >> tl.maximum(right, 0), low << tl.maximum(-right, 0))
    return ((mantissa * 0x28BE60DB) << (32 - right)) + low


@triton.jit
def _sin_cos_of_parts(r, tail, quarter):
    """Of ``r + tail``, at most π/4 in magnitude, and so many quarter turns."""
    z = r * r
    s = -0.00019517234593092596 * z + 0.0083321776855486
    s = s * z - 0.16666654936675102
    sine = r + (r * z * s + tail * (1.0 - 0.5 * z))
    c = 2.4433082511203844e-05 * z - 0.0013887315614714742
    c = c * z + 0.04166664567011179
    first = 1.0 - 0.5 * z
    cosine = first + (((1.0 - first) - 0.5 * z) + (z * z * c - r * tail))
    swap = (quarter & 1) == 1
    a, b = tl.where(swap, cosine, sine), tl.where(swap, sine, cosine)
    return tl.where((quarter & 2) == 2, -a, a), tl.where(((quarter + 1) & 2) == 2, -b, b)


@triton.jit
def _parts(turns):
    """The nearest number of quarter turns, and what is left, in radians, as two float32."""
    quarter = (turns + (1 << 61)) >> 62
    rest = turns - (quarter << 62)
    top = (rest >> 38).to(tl.int32)  # 2π · 2^-26 radians each
    bottom = (rest & ((1 << 38) - 1)).to(tl.float32)
    coarse, fine = (top >> 12).to(tl.float32), (top & 4095).to(tl.float32)
    # The factors have 12 bits, so these two products are exact.
    a, b = coarse * 0.0003833770751953125, fine * 9.359791874885559e-08
    error = coarse * 1.1812177609780744e-07 + fine * 2.883832424262877e-11 + bottom * 3.4061215800865545e-19
    whole = a + b
    error += (a - whole) + b
    r = whole + error
    return r, (whole - r) + error, quarter.to(tl.int32)


@triton.jit
def _sin_cos(position, single_ptr, exact_ptr, i, mask, EXACT: tl.constexpr):
    """Sine and cosine, float32, of ``position`` (int64) times the inverse frequencies at ``i``. ``EXACT``: of the true
    product; else of the float32 product."""
    if EXACT:
        r, tail, quarter = _parts(position * tl.load(exact_ptr + i, mask=mask, other=0))
        return _sin_cos_of_parts(r, tail, quarter)
    else:
        angle = position.to(tl.float32) * tl.load(single_ptr + i, mask=mask, other=0.0)
        magnitude = tl.abs(angle)
        r, tail, quarter = _parts(_turns(magnitude))
        small = magnitude < 0.785
        r, tail, quarter = tl.where(small, magnitude, r), tl.where(small, 0.0, tail), tl.where(small, 0, quarter)
        sine, cosine = _sin_cos_of_parts(r, tail, quarter)
        return tl.where(angle < 0.0, -sine, sine), cosine

"""Tiles of ``quantized_linear``'s operands in Triton: codes and activations become what a matrix unit multiplies.

Nothing here rounds. ``q - z`` is an integer of at most 15, exact in bfloat16, int8 and e4m3; an e4m3 value is exact in
float16 and bfloat16. Where an architecture has no e4m3 (sm_80) or another one (gfx942), ``BITS``: values of e4m3 are
placed in a float16 by their bits, which makes them 2⁻⁸ of what they are; the kernel multiplies that out of the sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m4ov_kernels.dispatch import triton_interpreted
from m4ov_kernels.gemm.options import ACTIVATIONS, KINDS

# Interpreted, bfloat16 arithmetic is garbage: operands are widened there.
_WIDEN = tl.constexpr(triton_interpreted())
INT4, INT8, FP8 = (tl.constexpr(KINDS[kind]) for kind in ("int4", "int8", "fp8"))  # kinds of codes
BF16 = tl.constexpr(ACTIVATIONS["bf16"])  # kind of activations, beside INT8 and FP8


@triton.jit
def _float16_of_e4m3(bits):
    """2⁻⁸ of the values, exactly: float16 has one bit of exponent more, and its bias is 15, not 7."""
    wide = bits.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def _activations(x, ACTIVATION: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr):
    """Of a tile ``[BLOCK_M, BLOCK_K]`` the right-hand operands: one ``[BLOCK_K, BLOCK_M]``, or with ``WORDS`` four
    ``[BLOCK_K / 4, BLOCK_M]``: place 2j + h of the i-th is feature 8j + 4h + i."""
    if WORDS:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 4, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return _widened(first).T, _widened(second).T, _widened(third).T, _widened(fourth).T
    else:
        return (_activation(x, ACTIVATION, BITS).T,)


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr, BITS: tl.constexpr):
    if ACTIVATION == BF16:
        return _widened(x)
    elif ACTIVATION == FP8 and BITS:
        return _float16_of_e4m3(x)
    else:
        return x


@triton.jit
def _widened(x):
    if _WIDEN:
        return x.to(tl.float32)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def _codes(packed, zero, ACTIVATION: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of packed bytes ``[BLOCK_N, BLOCK_K / 2]`` and zero points ``[BLOCK_N]``: q - z ``[BLOCK_N, BLOCK_K]``."""
    q = tl.reshape(tl.join(packed & 15, packed >> 4), [BLOCK_N, BLOCK_K])
    if ACTIVATION == FP8:
        # With the exponent of 1024 an integer is a float16's last bits. Of its difference e4m3 has all bits.
        value = (q.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (zero + 1024).to(tl.float16)[:, None]
        if BITS:
            return value
        else:
            return value.to(tl.float8e4nv)
    else:
        value = q.to(tl.int8) - zero.to(tl.int8)[:, None]
        if ACTIVATION == INT8:
            return value
        else:
            return _widened(value)


@triton.jit
def _codes_of_words(words, zero, i: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of words ``[BLOCK_N, BLOCK_K / 8]`` of eight codes each the codes i and i + 4, less zero points, in bfloat16
    ``[BLOCK_N, BLOCK_K / 4]``, in the order of ``_activations``. Two codes at a time: with the exponent of 128 an
    integer is a bfloat16's last bits, and the difference is exact."""
    pairs = ((words >> (4 * i)) & 0x000F000F) | 0x43004300
    halves = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    value = _widened(tl.reshape(halves, [BLOCK_N, BLOCK_K // 4]).to(tl.bfloat16, bitcast=True))
    return value - (zero + 128).to(tl.float32).to(value.dtype)[:, None]


@triton.jit
def _values(weight, KIND: tl.constexpr, ACTIVATION: tl.constexpr, BITS: tl.constexpr):
    """Of a tile of eight-bit codes the left-hand operand."""
    if KIND == FP8 and ACTIVATION == BF16:
        if BITS:
            return _widened(_float16_of_e4m3(weight).to(tl.float32) * 256.0)
        else:
            return _widened(weight)
    else:
        return _activation(weight, ACTIVATION, BITS)

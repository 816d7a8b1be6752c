"""The Triton kernels of ``qk_norm_mrope``: one token at a time, whose sines and cosines serve all of its heads."""

from __future__ import annotations

import triton
import triton.language as tl

from m4ov_kernels.rope.triton.angles import _sin_cos


@triton.jit
def _round(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def _position(position_ptr, axis_stride, token, token_stride, axis_ptr, i, inside, AXES: tl.constexpr):
    """int64: of a token, the position for each frequency."""
    place = token * token_stride
    if AXES > 1:
        place += tl.load(axis_ptr + i, mask=inside, other=0).to(tl.int64) * axis_stride
    else:
        place += tl.zeros_like(i).to(tl.int64)
    return tl.load(position_ptr + place, mask=inside, other=0).to(tl.int64)


@triton.jit
def _normed(x, rstd, weight, dtype: tl.constexpr, NUMERICS: tl.constexpr):
    """Rounded where ``NUMERICS`` says so; 0 is hf, 1 vllm."""
    y = x * rstd
    if NUMERICS == 0:
        y = _round(y, dtype)
    y = y * weight
    if NUMERICS != 2:
        y = _round(y, dtype)
    return y


@triton.jit
def _turn_forth(
    x_ptr,  # of one token: [heads, dim], stride given
    head_stride,
    weight_ptr,
    out_ptr,  # [heads, dim]
    heads,
    dim,
    half,
    sine,
    cosine,
    eps,
    NUMERICS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    i = tl.arange(0, BLOCK_HALF)
    j = tl.arange(0, 2 * BLOCK_HALF)
    inside, in_rest = i < half, j < dim - 2 * half
    sine, cosine = sine[None, :], cosine[None, :]
    if HAS_WEIGHT:
        weight_a = tl.load(weight_ptr + i, mask=inside, other=0.0).to(tl.float32)[None, :]
        weight_b = tl.load(weight_ptr + half + i, mask=inside, other=0.0).to(tl.float32)[None, :]
        if HAS_REST:
            weight_rest = tl.load(weight_ptr + 2 * half + j, mask=in_rest, other=0.0).to(tl.float32)[None, :]
    for first in range(0, heads, BLOCK_HEADS):
        head = (first + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
        mask = (head < heads) & inside[None, :]
        row = x_ptr + head * head_stride
        a = tl.load(row + i[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(row + half + i[None, :], mask=mask, other=0.0).to(tl.float32)
        rest_mask = (head < heads) & in_rest[None, :]
        if HAS_REST:
            rest = tl.load(row + 2 * half + j[None, :], mask=rest_mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            squares = tl.sum(a * a + b * b, axis=1)
            if HAS_REST:
                squares += tl.sum(rest * rest, axis=1)
            rstd = tl.rsqrt(squares / tl.cast(dim, tl.float32) + tl.cast(eps, tl.float32))[:, None]
            a = _normed(a, rstd, weight_a, dtype, NUMERICS)
            b = _normed(b, rstd, weight_b, dtype, NUMERICS)
            if HAS_REST:
                rest = _normed(rest, rstd, weight_rest, dtype, NUMERICS)
        a_cos, b_sin, b_cos, a_sin = a * cosine, b * sine, b * cosine, a * sine
        if NUMERICS != 2:
            a_cos, b_sin = _round(a_cos, dtype), _round(b_sin, dtype)
            b_cos, a_sin = _round(b_cos, dtype), _round(a_sin, dtype)
        target = out_ptr + head * dim
        tl.store(target + i[None, :], (a_cos - b_sin).to(dtype), mask=mask)
        tl.store(target + half + i[None, :], (b_cos + a_sin).to(dtype), mask=mask)
        if HAS_REST:
            tl.store(target + 2 * half + j[None, :], rest.to(dtype), mask=rest_mask)


@triton.jit(do_not_specialize=["axis_stride", "position_stride"])
def _qk_norm_mrope_fwd_kernel(
    q_ptr,  # [tokens, q_heads, dim], strides given
    q_token_stride,
    q_head_stride,
    q_weight_ptr,  # [dim], or unused
    q_out_ptr,  # [tokens, q_heads, dim]
    q_heads,
    k_ptr,  # likewise
    k_token_stride,
    k_head_stride,
    k_weight_ptr,
    k_out_ptr,
    k_heads,
    position_ptr,  # int32 or int64 [AXES, tokens], strides given
    axis_stride,
    position_stride,
    single_ptr,  # fp32 [half]: inverse frequencies
    exact_ptr,  # int64 [half]: the same in turns of 2^-64
    axis_ptr,  # int32 [half]: which position
    dim,
    half,
    eps,
    NUMERICS: tl.constexpr,
    AXES: tl.constexpr,
    HAS_Q_WEIGHT: tl.constexpr,
    HAS_K_WEIGHT: tl.constexpr,
    HAS_REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    token = tl.cast(tl.program_id(0), tl.int64)
    i = tl.arange(0, BLOCK_HALF)
    position = _position(position_ptr, axis_stride, token, position_stride, axis_ptr, i, i < half, AXES)
    sine, cosine = _sin_cos(position, single_ptr, exact_ptr, i, i < half, NUMERICS == 2)
    if NUMERICS != 2:
        sine, cosine = _round(sine, q_out_ptr.dtype.element_ty), _round(cosine, q_out_ptr.dtype.element_ty)
    q_ptr += token * q_token_stride
    q_out_ptr += token * q_heads * dim
    _turn_forth(
        q_ptr, q_head_stride, q_weight_ptr, q_out_ptr, q_heads, dim, half, sine, cosine, eps,
        NUMERICS, HAS_Q_WEIGHT, HAS_REST, BLOCK_HEADS, BLOCK_HALF,
    )  # fmt: skip
    k_ptr += token * k_token_stride
    k_out_ptr += token * k_heads * dim
    _turn_forth(
        k_ptr, k_head_stride, k_weight_ptr, k_out_ptr, k_heads, dim, half, sine, cosine, eps,
        NUMERICS, HAS_K_WEIGHT, HAS_REST, BLOCK_HEADS, BLOCK_HALF,
    )  # fmt: skip


@triton.jit
def _turn_back(
    grad_ptr,  # of one token: [heads, dim], stride given
    grad_head_stride,
    x_ptr,  # likewise, or unused
    head_stride,
    weight_ptr,
    out_ptr,  # [heads, dim]
    sum_a,  # fp32 [BLOCK_HEADS, BLOCK_HALF]: the weight's gradient so far, of the first half
    sum_b,  # of the second half
    sum_rest,  # fp32 [BLOCK_HEADS, 2 · BLOCK_HALF], of the rest
    heads,
    dim,
    half,
    sine,
    cosine,
    eps,
    HAS_WEIGHT: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    HAS_REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    i = tl.arange(0, BLOCK_HALF)
    j = tl.arange(0, 2 * BLOCK_HALF)
    inside, in_rest = i < half, j < dim - 2 * half
    sine, cosine = sine[None, :], cosine[None, :]
    if HAS_WEIGHT:
        weight_a = tl.load(weight_ptr + i, mask=inside, other=0.0).to(tl.float32)[None, :]
        weight_b = tl.load(weight_ptr + half + i, mask=inside, other=0.0).to(tl.float32)[None, :]
        if HAS_REST:
            weight_rest = tl.load(weight_ptr + 2 * half + j, mask=in_rest, other=0.0).to(tl.float32)[None, :]
    for first in range(0, heads, BLOCK_HEADS):
        head = (first + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
        mask = (head < heads) & inside[None, :]
        rest_mask = (head < heads) & in_rest[None, :]
        row = grad_ptr + head * grad_head_stride
        grad_a = tl.load(row + i[None, :], mask=mask, other=0.0).to(tl.float32)
        grad_b = tl.load(row + half + i[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_REST:
            rest = tl.load(row + 2 * half + j[None, :], mask=rest_mask, other=0.0).to(tl.float32)
        a, b = grad_a * cosine + grad_b * sine, grad_b * cosine - grad_a * sine
        if HAS_WEIGHT:
            row = x_ptr + head * head_stride
            x_a = tl.load(row + i[None, :], mask=mask, other=0.0).to(tl.float32)
            x_b = tl.load(row + half + i[None, :], mask=mask, other=0.0).to(tl.float32)
            squares = tl.sum(x_a * x_a + x_b * x_b, axis=1)
            products = tl.sum(a * weight_a * x_a + b * weight_b * x_b, axis=1)
            if HAS_REST:
                x_rest = tl.load(row + 2 * half + j[None, :], mask=rest_mask, other=0.0).to(tl.float32)
                squares += tl.sum(x_rest * x_rest, axis=1)
                products += tl.sum(rest * weight_rest * x_rest, axis=1)
            width = tl.cast(dim, tl.float32)
            rstd = tl.rsqrt(squares / width + tl.cast(eps, tl.float32))
            mean = (products * rstd / width)[:, None]
            rstd = tl.where(head < heads, rstd[:, None], 0.0)  # of no head: 1 / sqrt(eps), and eps may be 0
            mean = tl.where(head < heads, mean, 0.0)
            x_a, x_b = x_a * rstd, x_b * rstd
            if NEED_WEIGHT:
                sum_a += a * x_a
                sum_b += b * x_b
            a, b = (a * weight_a - x_a * mean) * rstd, (b * weight_b - x_b * mean) * rstd
            if HAS_REST:
                x_rest = x_rest * rstd
                if NEED_WEIGHT:
                    sum_rest += rest * x_rest
                rest = (rest * weight_rest - x_rest * mean) * rstd
        target = out_ptr + head * dim
        tl.store(target + i[None, :], a.to(dtype), mask=mask)
        tl.store(target + half + i[None, :], b.to(dtype), mask=mask)
        if HAS_REST:
            tl.store(target + 2 * half + j[None, :], rest.to(dtype), mask=rest_mask)
    return sum_a, sum_b, sum_rest


@triton.jit
def _store_partial(partial_ptr, sum_a, sum_b, sum_rest, dim, half, HAS_REST: tl.constexpr, BLOCK_HALF: tl.constexpr):
    i = tl.arange(0, BLOCK_HALF)
    tl.store(partial_ptr + i, tl.sum(sum_a, axis=0), mask=i < half)
    tl.store(partial_ptr + half + i, tl.sum(sum_b, axis=0), mask=i < half)
    if HAS_REST:
        j = tl.arange(0, 2 * BLOCK_HALF)
        tl.store(partial_ptr + 2 * half + j, tl.sum(sum_rest, axis=0), mask=j < dim - 2 * half)


@triton.jit(do_not_specialize=["axis_stride", "position_stride", "tokens"])
def _qk_norm_mrope_bwd_kernel(
    grad_q_ptr,  # [tokens, q_heads, dim], strides given: of the result
    grad_q_token_stride,
    grad_q_head_stride,
    q_ptr,  # likewise, or unused
    q_token_stride,
    q_head_stride,
    q_weight_ptr,  # [dim], or unused
    q_out_ptr,  # [tokens, q_heads, dim]
    q_partial_ptr,  # fp32 [programs, dim], or unused
    q_heads,
    grad_k_ptr,  # likewise
    grad_k_token_stride,
    grad_k_head_stride,
    k_ptr,
    k_token_stride,
    k_head_stride,
    k_weight_ptr,
    k_out_ptr,
    k_partial_ptr,
    k_heads,
    position_ptr,  # as in the forward
    axis_stride,
    position_stride,
    single_ptr,
    exact_ptr,
    axis_ptr,
    tokens,
    dim,
    half,
    eps,
    EXACT: tl.constexpr,
    AXES: tl.constexpr,
    HAS_Q_WEIGHT: tl.constexpr,
    HAS_K_WEIGHT: tl.constexpr,
    NEED_Q_WEIGHT: tl.constexpr,
    NEED_K_WEIGHT: tl.constexpr,
    HAS_REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    program = tl.program_id(0)
    i = tl.arange(0, BLOCK_HALF)
    q_sum_a = tl.zeros([BLOCK_HEADS, BLOCK_HALF], tl.float32)
    q_sum_b = tl.zeros([BLOCK_HEADS, BLOCK_HALF], tl.float32)
    q_sum_rest = tl.zeros([BLOCK_HEADS, 2 * BLOCK_HALF], tl.float32)
    k_sum_a = tl.zeros([BLOCK_HEADS, BLOCK_HALF], tl.float32)
    k_sum_b = tl.zeros([BLOCK_HEADS, BLOCK_HALF], tl.float32)
    k_sum_rest = tl.zeros([BLOCK_HEADS, 2 * BLOCK_HALF], tl.float32)
    for index in range(program, tokens, tl.num_programs(0)):
        token = tl.cast(index, tl.int64)
        position = _position(position_ptr, axis_stride, token, position_stride, axis_ptr, i, i < half, AXES)
        sine, cosine = _sin_cos(position, single_ptr, exact_ptr, i, i < half, EXACT)
        q_sum_a, q_sum_b, q_sum_rest = _turn_back(
            grad_q_ptr + token * grad_q_token_stride, grad_q_head_stride, q_ptr + token * q_token_stride, q_head_stride,
            q_weight_ptr, q_out_ptr + token * q_heads * dim, q_sum_a, q_sum_b, q_sum_rest, q_heads, dim, half,
            sine, cosine, eps, HAS_Q_WEIGHT, NEED_Q_WEIGHT, HAS_REST, BLOCK_HEADS, BLOCK_HALF,
        )  # fmt: skip
        k_sum_a, k_sum_b, k_sum_rest = _turn_back(
            grad_k_ptr + token * grad_k_token_stride, grad_k_head_stride, k_ptr + token * k_token_stride, k_head_stride,
            k_weight_ptr, k_out_ptr + token * k_heads * dim, k_sum_a, k_sum_b, k_sum_rest, k_heads, dim, half,
            sine, cosine, eps, HAS_K_WEIGHT, NEED_K_WEIGHT, HAS_REST, BLOCK_HEADS, BLOCK_HALF,
        )  # fmt: skip
    place = tl.cast(program, tl.int64) * dim
    if NEED_Q_WEIGHT:
        _store_partial(q_partial_ptr + place, q_sum_a, q_sum_b, q_sum_rest, dim, half, HAS_REST, BLOCK_HALF)
    if NEED_K_WEIGHT:
        _store_partial(k_partial_ptr + place, k_sum_a, k_sum_b, k_sum_rest, dim, half, HAS_REST, BLOCK_HALF)

"""The Triton kernels of ``linear_kl``; ``triton_kl.py`` launches them.

As those of ``linear_logprob``, with the logits of two heads, one after the other, for every tile of words and tokens:
splits of the vocabulary by the configuration alone, each split's state written once and merged in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m4ov_kernels.head.triton_logprob_kernels import _MOST, _logits, _place, _products, _shift, _store

# Takes the place of -inf where it would meet a probability of 0, or another -inf.
_FAR = tl.constexpr(-1e30)
_FREE = ["rows", "vocab", "begin", "end", "splits"]
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _biased(x, bias_ptr, index, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:  # without a mask, which would be a scalar register for each word on AMD
        x += tl.load(bias_ptr + index).to(tl.float32)[None, :]
    return x


@triton.jit
def _two_logits(
    first,
    first_stride,
    first_weight,
    first_weight_stride,
    first_bias_ptr,
    second,
    second_stride,
    second_weight,
    second_weight_stride,
    second_bias_ptr,
    row,
    word,
    rows,
    vocab,
    first_dim,
    second_dim,
    scale,
    dtype: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FIRST_BIAS: tl.constexpr,
    SECOND_BIAS: tl.constexpr,
    ROUNDED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """float32 ``[BLOCK_T, BLOCK_V]`` of each head, tokens from ``row``, words from ``word``."""
    index = tl.minimum(word + tl.arange(0, BLOCK_V), vocab - 1)  # past the end nothing is used
    x = _products(
        first,
        first_stride,
        first_weight,
        first_weight_stride,
        row,
        word,
        rows,
        vocab,
        first_dim,
        DESCRIPTORS,
        BLOCK_T,
        BLOCK_V,
        BLOCK_D,
    )
    x = _biased(x, first_bias_ptr, index, FIRST_BIAS)
    x = _logits(x, first_bias_ptr, index, vocab, scale, 0.0, dtype, False, ROUNDED, SCALED, False)
    y = _products(
        second,
        second_stride,
        second_weight,
        second_weight_stride,
        row,
        word,
        rows,
        vocab,
        second_dim,
        DESCRIPTORS,
        BLOCK_T,
        BLOCK_V,
        BLOCK_D,
    )
    y = _biased(y, second_bias_ptr, index, SECOND_BIAS)
    y = _logits(y, second_bias_ptr, index, vocab, scale, 0.0, dtype, False, ROUNDED, SCALED, False)
    return x, y


@triton.jit
def _if_any(weight, x):
    """An infinite gap of a word without a probability is nothing."""
    return tl.where(weight == 0.0, 0.0, x)


@triton.jit
def _back(largest, shift):
    return tl.maximum(tl.minimum(largest, _MOST) - shift, _FAR)


@triton.jit
def _halfway(log_p, log_q):
    """Of log p and log q, none below ``_FAR``: log q - log p within ±200, e^-|that|, and log(1 + e^-|that|)."""
    gap = tl.minimum(tl.maximum(log_q - log_p, -200.0), 200.0)
    share = tl.exp(-tl.abs(gap))
    # Minimax to 2e-8: tl.log looks for denormal numbers, a mask each.
    log = 0.07836166769 + share * (-0.02958850749 + share * 0.005253457930)
    log = 0.3331927061 + share * (-0.2484436929 + share * (0.1911143064 + share * (-0.1367477030 + share * log)))
    return gap, share, share * (1.0 + share * (-0.4999950230 + share * log))


@triton.jit
def _from_both(gap, share, log):
    """(KL(p ‖ m) + KL(q ‖ m)) / (p + q): h tanh h - log cosh h with h = gap / 2. Near 0 its own series is exact."""
    square = gap * gap * 0.25
    series = -0.0472222222 + square * (0.0196825397 + square * -0.00812463257)
    series = square * (0.5 + square * (-0.25 + square * (0.111111111 + square * series)))
    whole = _LN2 - tl.abs(gap) * (share / (1.0 + share)) - log
    near = tl.minimum(tl.maximum((0.7 - tl.abs(gap)) * 1e8, 0.0), 1.0)  # a number, where a mask takes more registers
    return whole + near * (series - whole)


@triton.jit(do_not_specialize=_FREE)
def _linear_kl_fwd_kernel(
    first,  # [rows, first_dim]: a descriptor of blocks [BLOCK_T, BLOCK_D], or a pointer
    first_stride,
    first_weight,  # [vocab, first_dim]: a descriptor of blocks [BLOCK_V, BLOCK_D], or a pointer
    first_weight_stride,
    first_bias_ptr,  # [vocab], or unused
    second,  # the same of the other head
    second_stride,
    second_weight,
    second_weight_stride,
    second_bias_ptr,
    live_ptr,  # int64: rows from here on are not computed
    normalizer_ptr,  # fp32 [4, rows]: shift and log-sum of each head; with JSD
    partial_ptr,  # fp32 [splits, STATES, rows]: see _linear_kl_merge_kernel
    rows,
    vocab,
    first_dim,
    second_dim,
    scale,  # with ROUNDED the temperature, else its reciprocal; used with SCALED
    DESCRIPTORS: tl.constexpr,
    FIRST_BIAS: tl.constexpr,
    SECOND_BIAS: tl.constexpr,
    ROUNDED: tl.constexpr,
    SCALED: tl.constexpr,
    JSD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
):
    dtype: tl.constexpr = first.dtype if DESCRIPTORS else first.dtype.element_ty
    states: tl.constexpr = 2 if JSD else 5
    scale = tl.cast(scale, tl.float32)
    blocks = tl.cdiv(tl.cast(tl.load(live_ptr), tl.int32), BLOCK_T)
    splits = tl.cdiv(vocab, BLOCK_V * TILES)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    units = tl.cdiv(blocks * splits - program, programs)
    step = tl.cast(rows, tl.int64)
    # Of the first head the largest logit x, the sum of e^(x - largest) and that of e^(x - largest) · ((x - largest x) -
    # (y - largest y)); of the second, y, two. With JSD the two sums alone.
    largest_x = tl.full([BLOCK_T], float("-inf"), tl.float32)
    largest_y = tl.full([BLOCK_T], float("-inf"), tl.float32)
    sum_x = tl.zeros([BLOCK_T], tl.float32)
    sum_y = tl.zeros([BLOCK_T], tl.float32)
    gaps = tl.zeros([BLOCK_T], tl.float32)
    for turn in range(units * TILES):
        tile = turn % TILES
        block, split = _place(program + turn // TILES * programs, blocks, splits, GROUP)
        row = block * BLOCK_T
        word = (split * TILES + tile) * BLOCK_V
        x, y = _two_logits(
            first,
            first_stride,
            first_weight,
            first_weight_stride,
            first_bias_ptr,
            second,
            second_stride,
            second_weight,
            second_weight_stride,
            second_bias_ptr,
            row,
            word,
            rows,
            vocab,
            first_dim,
            second_dim,
            scale,
            dtype,
            DESCRIPTORS,
            FIRST_BIAS,
            SECOND_BIAS,
            ROUNDED,
            SCALED,
            BLOCK_T,
            BLOCK_V,
            BLOCK_D,
        )
        # As above. (Plus an infinite logit it is NaN, and so is what comes of an infinite logit.)
        nothing = tl.where(word + tl.arange(0, BLOCK_V) < vocab, 0.0, float("-inf"))[None, :]
        x += nothing
        y += nothing
        token = row + tl.arange(0, BLOCK_T)
        there = token < rows
        fresh = tile == 0
        sum_x = tl.where(fresh, 0.0, sum_x)
        sum_y = tl.where(fresh, 0.0, sum_y)
        if JSD:
            at = normalizer_ptr + token
            shift_x = tl.load(at, mask=there, other=0.0)
            log_x = tl.load(at + step, mask=there, other=0.0)
            shift_y = tl.load(at + 2 * step, mask=there, other=0.0)
            log_y = tl.load(at + 3 * step, mask=there, other=0.0)
            log_p = tl.maximum(x - shift_x[:, None] - log_x[:, None], _FAR)
            log_q = tl.maximum(y - shift_y[:, None] - log_y[:, None], _FAR)
            larger = tl.exp(tl.maximum(log_p, log_q))
            gap, share, log = _halfway(log_p, log_q)
            sum_x += tl.sum(0.5 * larger * (1.0 + share) * _from_both(gap, share, log), axis=1)
            lower = tl.minimum(tl.maximum(gap * 1e30, 0.0), 1.0)  # 1 where q is larger, else 0
            p = larger * (lower * share + (1.0 - lower))
            sum_y += tl.sum(p * (_LN2 - tl.maximum(gap, 0.0) - log), axis=1)
        else:
            largest_x = tl.where(fresh, float("-inf"), largest_x)
            largest_y = tl.where(fresh, float("-inf"), largest_y)
            gaps = tl.where(fresh, 0.0, gaps)
            higher_x = tl.maximum(largest_x, tl.max(x, axis=1))
            higher_y = tl.maximum(largest_y, tl.max(y, axis=1))
            shift_x = _shift(higher_x)
            shift_y = _shift(higher_y)
            back_x = _back(largest_x, shift_x)
            back_y = _back(largest_y, shift_y)
            again = tl.exp(back_x)
            gaps = _if_any(again, again * (gaps + (back_x - back_y) * sum_x))
            x = x - shift_x[:, None]
            y = y - shift_y[:, None]
            exponential = tl.exp(x)
            gaps += tl.sum(_if_any(exponential, exponential * (x - y)), axis=1)
            sum_x = sum_x * again + tl.sum(exponential, axis=1)
            sum_y = sum_y * tl.exp(back_y) + tl.sum(tl.exp(y), axis=1)
            largest_x = higher_x
            largest_y = higher_y
        if tile == TILES - 1:
            to = partial_ptr + (tl.cast(split, tl.int64) * states * step + token)
            if JSD:
                tl.store(to, sum_x, mask=there)
                tl.store(to + step, sum_y, mask=there)
            else:
                tl.store(to, largest_x, mask=there)
                tl.store(to + step, sum_x, mask=there)
                tl.store(to + 2 * step, largest_y, mask=there)
                tl.store(to + 3 * step, sum_y, mask=there)
                tl.store(to + 4 * step, gaps, mask=there)


@triton.jit(do_not_specialize=_FREE)
def _linear_kl_merge_kernel(
    partial_ptr,  # fp32 [splits, STATES, rows]: as state_ptr, of each split
    state_ptr,  # fp32 [STATES, rows]: see kl_state.py
    splits,
    rows,
    JSD: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    states: tl.constexpr = 2 if JSD else 5
    token = tl.cast(tl.program_id(0), tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    step = tl.cast(rows, tl.int64)
    largest_x = tl.full([BLOCK_T], float("-inf"), tl.float32)
    largest_y = tl.full([BLOCK_T], float("-inf"), tl.float32)
    sum_x = tl.zeros([BLOCK_T], tl.float32)
    sum_y = tl.zeros([BLOCK_T], tl.float32)
    gaps = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        mask = (split < splits)[:, None] & (token < rows)[None, :]
        at = partial_ptr + (split[:, None] * states * step + token[None, :])
        if JSD:
            sum_x += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
            sum_y += tl.sum(tl.load(at + step, mask=mask, other=0.0), axis=0)
        else:
            part_x = tl.load(at, mask=mask, other=float("-inf"))
            part_sum = tl.load(at + step, mask=mask, other=0.0)
            part_y = tl.load(at + 2 * step, mask=mask, other=float("-inf"))
            part_gaps = tl.load(at + 4 * step, mask=mask, other=0.0)
            higher_x = tl.maximum(largest_x, tl.max(part_x, axis=0))
            higher_y = tl.maximum(largest_y, tl.max(part_y, axis=0))
            shift_x = _shift(higher_x)
            shift_y = _shift(higher_y)
            back_x = _back(largest_x, shift_x)
            back_y = _back(largest_y, shift_y)
            there_x = _back(part_x, shift_x[None, :])
            there_y = _back(part_y, shift_y[None, :])
            again = tl.exp(back_x)
            share = tl.exp(there_x)
            gaps = _if_any(again, again * (gaps + (back_x - back_y) * sum_x))
            gaps += tl.sum(_if_any(share, share * (part_gaps + (there_x - there_y) * part_sum)), axis=0)
            sum_x = sum_x * again + tl.sum(share * part_sum, axis=0)
            part_sum = tl.load(at + 3 * step, mask=mask, other=0.0)
            sum_y = sum_y * tl.exp(back_y) + tl.sum(tl.exp(there_y) * part_sum, axis=0)
            largest_x = higher_x
            largest_y = higher_y
    mask = token < rows
    if JSD:
        tl.store(state_ptr + token, sum_x, mask=mask)
        tl.store(state_ptr + step + token, sum_y, mask=mask)
    else:
        tl.store(state_ptr + token, largest_x, mask=mask)
        tl.store(state_ptr + step + token, sum_x, mask=mask)
        tl.store(state_ptr + 2 * step + token, largest_y, mask=mask)
        tl.store(state_ptr + 3 * step + token, sum_y, mask=mask)
        tl.store(state_ptr + 4 * step + token, gaps, mask=mask)


@triton.jit(do_not_specialize=_FREE)
def _linear_kl_bwd_kernel(
    first,  # as in the forward; the first head is the policy
    first_stride,
    first_weight,
    first_weight_stride,
    first_bias_ptr,
    second,
    second_stride,
    second_weight,
    second_weight_stride,
    second_bias_ptr,
    target_ptr,  # int64 [rows], negative in rows that do not count
    live_ptr,
    coefficients_ptr,  # fp32 [6, rows]: see kl_state.py
    out,  # [rows, out_stride], both in whole tiles: of the words from `begin` to `end` the gradient of the logits, by
    # a descriptor of blocks [BLOCK_T, BLOCK_V] or a pointer
    out_stride,
    bias_parts_ptr,  # fp32 [blocks of rows, out_stride]: the gradient's sums, or unused
    rows,
    vocab,
    first_dim,
    second_dim,
    begin,
    end,
    scale,
    DESCRIPTORS: tl.constexpr,
    FIRST_BIAS: tl.constexpr,
    SECOND_BIAS: tl.constexpr,
    ROUNDED: tl.constexpr,
    SCALED: tl.constexpr,
    KIND: tl.constexpr,  # 0: forward, 1: reverse, 2: jsd
    NEED_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A chunk's logits, again, and the policy's gradient in the dtype; rows that do not count (hidden states there
    finite) get zeros, rows from ``live`` on nothing."""
    dtype: tl.constexpr = first.dtype if DESCRIPTORS else first.dtype.element_ty
    scale = tl.cast(scale, tl.float32)
    blocks = tl.cdiv(tl.cast(tl.load(live_ptr), tl.int32), BLOCK_T)
    columns = tl.cdiv(end - begin, BLOCK_V)
    step = tl.cast(rows, tl.int64)
    for tile in range(tl.program_id(0), blocks * columns, tl.num_programs(0)):
        block, column = _place(tile, blocks, columns, GROUP)
        row = block * BLOCK_T
        word = begin + column * BLOCK_V
        x, y = _two_logits(
            first,
            first_stride,
            first_weight,
            first_weight_stride,
            first_bias_ptr,
            second,
            second_stride,
            second_weight,
            second_weight_stride,
            second_bias_ptr,
            row,
            word,
            rows,
            vocab,
            first_dim,
            second_dim,
            scale,
            dtype,
            DESCRIPTORS,
            FIRST_BIAS,
            SECOND_BIAS,
            ROUNDED,
            SCALED,
            BLOCK_T,
            BLOCK_V,
            BLOCK_D,
        )
        token = row + tl.arange(0, BLOCK_T)
        inside = token < rows
        inside &= tl.load(target_ptr + token, mask=inside, other=-1) >= 0
        at = coefficients_ptr + token
        shift_x = tl.load(at, mask=inside, other=_MOST)  # p and q are 0 in other rows
        log_x = tl.load(at + step, mask=inside, other=0.0)
        shift_y = tl.load(at + 2 * step, mask=inside, other=_MOST)
        log_y = tl.load(at + 3 * step, mask=inside, other=0.0)
        factor = tl.load(at + 4 * step, mask=inside, other=0.0)
        log_p = x - shift_x[:, None] - log_x[:, None]
        log_q = y - shift_y[:, None] - log_y[:, None]
        grad = tl.exp(log_p)
        if KIND == 0:
            grad -= tl.exp(log_q)
        else:
            offset = tl.load(at + 5 * step, mask=inside, other=0.0)
            if KIND == 1:
                grad *= _if_any(grad, log_p - log_q) - offset[:, None]
            else:
                gap, _, log = _halfway(tl.maximum(log_p, _FAR), tl.maximum(log_q, _FAR))
                grad *= _LN2 - tl.maximum(gap, 0.0) - log - offset[:, None]
        grad *= factor[:, None]
        _store(out, out_stride, row, word - begin, grad, DESCRIPTORS, BLOCK_T, BLOCK_V)
        if NEED_BIAS:
            part = tl.cast(block, tl.int64) * out_stride + (word - begin + tl.arange(0, BLOCK_V))
            tl.store(bias_parts_ptr + part, tl.sum(grad, axis=0))

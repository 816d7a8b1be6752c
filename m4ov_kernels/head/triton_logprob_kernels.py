"""The Triton kernels of ``linear_logprob``; ``triton_logprob.py`` launches them.

Logits exist a tile at a time, in registers. The vocabulary is cut into splits of ``TILES`` tiles, by the configuration
alone; a split of a block of tokens is one unit of the forward's work, whose state is written once and merged in order:
no bit of a token's results depends on how many tokens or programs there are, and nothing is added atomically.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m4ov_kernels.dispatch import triton_interpreted

# Interpreted, a bfloat16 tl.dot is garbage: operands are widened there.
_WIDEN = tl.constexpr(triton_interpreted())
# Takes the place of -inf where it would meet a probability of 0; exp of it is 0.
_FLOOR = tl.constexpr(-1000.0)
_MOST = tl.constexpr(3.4028234663852886e38)
_FREE = ["rows", "vocab", "first", "begin", "end", "splits"]


@triton.jit
def _place(unit, blocks, splits, GROUP: tl.constexpr):
    """Block of tokens and split of a unit: ``GROUP`` blocks at a time, whose hidden states stay in L2 while all of the
    weight passes by, and which read each part of it at the same time."""
    group = unit // (GROUP * splits)
    size = tl.minimum(blocks - group * GROUP, GROUP)
    inside = unit - group * GROUP * splits
    return group * GROUP + inside % size, inside // size


@triton.jit
def _products(
    hidden,
    hidden_stride,
    weight,
    weight_stride,
    row,
    word,
    rows,
    vocab,
    dim,
    DESCRIPTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """float32 ``[BLOCK_T, BLOCK_V]``: hidden states from ``row`` times the weight's rows from ``word``."""
    total = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    if not DESCRIPTORS:
        token = tl.cast(row, tl.int64) + tl.arange(0, BLOCK_T)
        number = tl.cast(word, tl.int64) + tl.arange(0, BLOCK_V)
        # Rows past the end repeat the last one: what they make is never stored.
        left = hidden + tl.minimum(token, rows - 1)[:, None] * hidden_stride
        right = weight + tl.minimum(number, vocab - 1)[None, :] * weight_stride
    steps = tl.cdiv(dim, BLOCK_D)
    tl.assume(steps > 0)  # else the loops around would be compiled twice
    for step in range(steps):
        if DESCRIPTORS:
            a = hidden.load([row, step * BLOCK_D])
            b = weight.load([word, step * BLOCK_D]).T
        else:
            col = step * BLOCK_D + tl.arange(0, BLOCK_D)
            a = tl.load(left + col[None, :], mask=col[None, :] < dim, other=0.0)
            b = tl.load(right + col[:, None], mask=col[:, None] < dim, other=0.0)
        if _WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _shift(largest):
    """What is taken from logits. While all are -inf, exp(-inf - 0) keeps the sum at 0; of an infinite logit the sum
    is infinite; a NaN that the maximum lost is in the sum."""
    return tl.where(largest == float("-inf"), 0.0, tl.minimum(largest, _MOST))


@triton.jit
def _within(place, size: tl.constexpr):
    """int32 places in a tile, -1 where it is in another."""
    return tl.where((place >= 0) & (place < size), place, -1).to(tl.int32)


@triton.jit
def _tanh(x):
    # Near 0 its own series is exact enough, and 1 - 2 / (e^2x + 1) would cancel.
    square = x * x
    series = x + x * square * (-0.333333333 + square * (0.133333333 + square * (-0.0539682540 + square * 0.0218694885)))
    return tl.where(tl.abs(x) < 0.25, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def _expm1(x):
    series = 1.0 + x / 5.0 * (1.0 + x / 6.0 * (1.0 + x / 7.0))
    series = x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * series)))
    return tl.where(tl.abs(x) < 0.35, series, tl.exp(x) - 1.0)


@triton.jit
def _logits(
    x,
    bias_ptr,
    index,
    vocab,
    scale,
    softcap,
    dtype: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROUNDED: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Products become logits; ``index`` ``[BLOCK_V]`` of their words."""
    if HAS_BIAS:
        x += tl.load(bias_ptr + index, mask=index < vocab, other=0.0).to(tl.float32)[None, :]
    if ROUNDED:
        x = x.to(dtype).to(tl.float32)
    if SCALED:
        if ROUNDED:
            x = tl.div_rn(x, tl.zeros_like(x) + scale).to(dtype).to(tl.float32)
        else:
            x *= scale
    if CAPPED:
        x = softcap * _tanh(x / softcap)
    return x


@triton.jit(do_not_specialize=_FREE)
def _linear_logprob_fwd_kernel(
    hidden,  # [rows, dim]: a descriptor of blocks [BLOCK_T, BLOCK_D], or a pointer
    hidden_stride,
    weight,  # [vocab, dim]: a descriptor of blocks [BLOCK_V, BLOCK_D], or a pointer
    weight_stride,
    bias_ptr,  # [vocab], or unused
    class_weight_ptr,  # fp32 [vocab], or unused
    target_ptr,  # int64 [rows]; of the whole vocabulary
    live_ptr,  # int64: rows from here on are not computed
    partial_ptr,  # fp32 [splits, STATES, rows]: see _linear_logprob_merge_kernel
    rows,
    vocab,
    dim,
    first,  # the weight's first row in the whole vocabulary
    scale,  # with ROUNDED the temperature, else its reciprocal; used with SCALED
    softcap,
    DESCRIPTORS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROUNDED: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    CENTRED: tl.constexpr,
    TOTAL: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
):
    dtype: tl.constexpr = hidden.dtype if DESCRIPTORS else hidden.dtype.element_ty
    states: tl.constexpr = 3 + CENTRED + TOTAL
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    blocks = tl.cdiv(tl.cast(tl.load(live_ptr), tl.int32), BLOCK_T)
    splits = tl.cdiv(vocab, BLOCK_V * TILES)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    units = tl.cdiv(blocks * splits - program, programs)
    step_of_states = tl.cast(rows, tl.int64)
    largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total_exp = tl.zeros([BLOCK_T], tl.float32)
    hit = tl.zeros([BLOCK_T], tl.float32)
    centred = tl.zeros([BLOCK_T], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    # One loop over all tiles of all units, so that the next tile is loaded while this one's softmax is computed, where
    # there are registers for both.
    flat: tl.constexpr = DESCRIPTORS and not CAPPED and not TOTAL
    for step in tl.range(0, units * TILES, flatten=flat):
        tile = step % TILES
        block, split = _place(program + step // TILES * programs, blocks, splits, GROUP)
        row = block * BLOCK_T
        word = (split * TILES + tile) * BLOCK_V
        x = _products(
            hidden,
            hidden_stride,
            weight,
            weight_stride,
            row,
            word,
            rows,
            vocab,
            dim,
            DESCRIPTORS,
            BLOCK_T,
            BLOCK_V,
            BLOCK_D,
        )
        index = word + tl.arange(0, BLOCK_V)
        x = _logits(x, bias_ptr, index, vocab, scale, softcap, dtype, HAS_BIAS, ROUNDED, SCALED, CAPPED)
        x = tl.where((index < vocab)[None, :], x, float("-inf"))
        token = row + tl.arange(0, BLOCK_T)
        target = tl.load(target_ptr + token, mask=token < rows, other=-1)
        place = _within(target - first - word, BLOCK_V)
        fresh = tile == 0
        largest = tl.where(fresh, float("-inf"), largest)
        total_exp = tl.where(fresh, 0.0, total_exp)
        hit = tl.where(fresh, 0.0, hit)
        higher = tl.maximum(largest, tl.max(x, axis=1))
        shift = _shift(higher)
        back = tl.minimum(largest, _MOST) - shift
        again = tl.exp(back)
        exponential = tl.exp(x - shift[:, None])
        if CENTRED:
            centred = tl.where(fresh, 0.0, centred)
            centred = again * (centred + tl.maximum(back, _FLOOR) * total_exp)
            centred += tl.sum(exponential * tl.maximum(x - shift[:, None], _FLOOR), axis=1)
        total_exp = total_exp * again + tl.sum(exponential, axis=1)
        largest = higher
        if TOTAL:
            counted = x
            if WEIGHTED:
                counted *= tl.load(class_weight_ptr + index, mask=index < vocab, other=0.0)[None, :]
            total = tl.where(fresh, 0.0, total)
            total += tl.sum(tl.where((index < vocab)[None, :], counted, 0.0), axis=1)
        if tl.max(place, axis=0) >= 0:  # in most tiles is nobody's target
            hit += tl.sum(tl.where(place[:, None] == tl.arange(0, BLOCK_V)[None, :], x, 0.0), axis=1)
        if tile == TILES - 1:
            to = partial_ptr + (tl.cast(split, tl.int64) * states * step_of_states + token)
            tl.store(to, largest, mask=token < rows)
            tl.store(to + step_of_states, total_exp, mask=token < rows)
            tl.store(to + 2 * step_of_states, hit, mask=token < rows)
            if CENTRED:
                tl.store(to + 3 * step_of_states, centred, mask=token < rows)
            if TOTAL:
                tl.store(to + (3 + CENTRED) * step_of_states, total, mask=token < rows)


@triton.jit(do_not_specialize=_FREE)
def _linear_logprob_merge_kernel(
    partial_ptr,  # fp32 [splits, STATES, rows]: maximum, sum of exp(x - maximum), the target's logit or 0, and if asked
    # for the sum of exp(x - maximum) · (x - maximum), and the sum of logits
    state_ptr,  # fp32 [5, rows]: see state.py
    splits,
    rows,
    CENTRED: tl.constexpr,
    TOTAL: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    states: tl.constexpr = 3 + CENTRED + TOTAL
    token = tl.cast(tl.program_id(0), tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    step = tl.cast(rows, tl.int64)
    largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total_exp = tl.zeros([BLOCK_T], tl.float32)
    hit = tl.zeros([BLOCK_T], tl.float32)
    centred = tl.zeros([BLOCK_T], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        mask = (split < splits)[:, None] & (token < rows)[None, :]
        at = partial_ptr + (split[:, None] * states * step + token[None, :])
        part = tl.load(at, mask=mask, other=float("-inf"))
        part_exp = tl.load(at + step, mask=mask, other=0.0)
        hit += tl.sum(tl.load(at + 2 * step, mask=mask, other=0.0), axis=0)
        higher = tl.maximum(largest, tl.max(part, axis=0))
        shift = _shift(higher)
        back = tl.minimum(largest, _MOST) - shift
        there = tl.minimum(part, _MOST) - shift[None, :]
        again = tl.exp(back)
        share = tl.exp(there)
        if CENTRED:
            there = tl.maximum(there, _FLOOR)
            part_centred = tl.load(at + 3 * step, mask=mask, other=0.0) + there * part_exp
            centred = again * (centred + tl.maximum(back, _FLOOR) * total_exp)
            centred += tl.sum(share * part_centred, axis=0)
        if TOTAL:
            total += tl.sum(tl.load(at + (3 + CENTRED) * step, mask=mask, other=0.0), axis=0)
        total_exp = total_exp * again + tl.sum(share * part_exp, axis=0)
        largest = higher
    mask = token < rows
    tl.store(state_ptr + token, largest, mask=mask)
    tl.store(state_ptr + step + token, total_exp, mask=mask)
    tl.store(state_ptr + 2 * step + token, hit, mask=mask)
    tl.store(state_ptr + 3 * step + token, centred, mask=mask)
    tl.store(state_ptr + 4 * step + token, total, mask=mask)


@triton.jit
def _store(out, stride, row, column, x, DESCRIPTOR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """A whole tile, for which there is room."""
    if DESCRIPTOR:
        out.store([row, column], x.to(out.dtype))
    else:
        to = out + (tl.cast(row, tl.int64) * stride + column)
        to += tl.arange(0, BLOCK_T)[:, None] * stride + tl.arange(0, BLOCK_V)[None, :]
        tl.store(to, x.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=_FREE)
def _linear_logprob_bwd_kernel(
    hidden,  # as in the forward
    hidden_stride,
    weight,
    weight_stride,
    bias_ptr,
    class_weight_ptr,
    target_ptr,
    live_ptr,
    coefficients_ptr,  # fp32 [6, rows]: see state.py; unused with LOGITS
    out,  # [rows, out_stride], both in whole tiles: of the words from `begin` to `end` the gradient of the logits, by
    # a descriptor of blocks [BLOCK_T, BLOCK_V] or a pointer; or fp32 logits, by a pointer
    out_stride,
    bias_parts_ptr,  # fp32 [blocks of rows, out_stride]: the gradient's sums, or unused
    rows,
    vocab,
    dim,
    first,
    begin,
    end,
    scale,
    softcap,
    DESCRIPTORS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROUNDED: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    GENERAL: tl.constexpr,  # the gradient is more than p · constant, and the target's
    WEIGHTED: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    LOGITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A chunk's logits, again, and their gradient in the dtype; rows without a loss (hidden states there finite) get
    zeros, rows from ``live`` on nothing."""
    dtype: tl.constexpr = hidden.dtype if DESCRIPTORS else hidden.dtype.element_ty
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    blocks = tl.cdiv(tl.cast(tl.load(live_ptr), tl.int32), BLOCK_T)
    columns = tl.cdiv(end - begin, BLOCK_V)
    step_of_coefficients = tl.cast(rows, tl.int64)
    flat: tl.constexpr = DESCRIPTORS and not CAPPED
    for tile in tl.range(tl.program_id(0), blocks * columns, tl.num_programs(0), flatten=flat):
        block, column = _place(tile, blocks, columns, GROUP)
        row = block * BLOCK_T
        word = begin + column * BLOCK_V
        x = _products(
            hidden,
            hidden_stride,
            weight,
            weight_stride,
            row,
            word,
            rows,
            vocab,
            dim,
            DESCRIPTORS,
            BLOCK_T,
            BLOCK_V,
            BLOCK_D,
        )
        index = word + tl.arange(0, BLOCK_V)
        x = _logits(x, bias_ptr, index, vocab, scale, softcap, dtype, HAS_BIAS, ROUNDED, SCALED, CAPPED)
        token = row + tl.arange(0, BLOCK_T)
        if LOGITS:
            _store(out, out_stride, row, word - begin, x, False, BLOCK_T, BLOCK_V)
        else:
            inside = token < rows
            target = tl.load(target_ptr + token, mask=inside, other=-1)
            place = _within(target - first - word, BLOCK_V)
            at = coefficients_ptr + token
            inside &= target >= 0
            shift = tl.load(at, mask=inside, other=_MOST)  # p is 0 in other rows
            log_sum = tl.load(at + step_of_coefficients, mask=inside, other=0.0)
            constant = tl.load(at + 2 * step_of_coefficients, mask=inside, other=0.0)
            at_target = tl.load(at + 4 * step_of_coefficients, mask=inside, other=0.0)
            found = tl.zeros([BLOCK_T], tl.float32)
            if tl.max(place, axis=0) >= 0:
                found = tl.sum(tl.where(place[:, None] == tl.arange(0, BLOCK_V)[None, :], x, 0.0), axis=1)
            # The gradient at the target cancels, p - 1: it takes expm1. Two steps: log p is small where p is large,
            # and keeps its precision there.
            log_p = found - shift - log_sum
            wanted = (constant + at_target) * tl.exp(log_p) - at_target * _expm1(log_p)
            all_log_p = x - shift[:, None] - log_sum[:, None]
            if GENERAL:
                linear = tl.load(at + 3 * step_of_coefficients, mask=inside, other=0.0)
                uniform = tl.load(at + 5 * step_of_coefficients, mask=inside, other=0.0)
                wanted += linear * tl.maximum(log_p, _FLOOR) * tl.exp(log_p)
                grad = tl.exp(all_log_p) * (constant[:, None] + linear[:, None] * tl.maximum(all_log_p, _FLOOR))
            else:
                grad = tl.exp(all_log_p) * constant[:, None]
            grad = tl.where(place[:, None] == tl.arange(0, BLOCK_V)[None, :], wanted[:, None], grad)
            if GENERAL:
                if WEIGHTED:
                    share = tl.load(class_weight_ptr + index, mask=index < vocab, other=0.0)
                    grad += uniform[:, None] * share[None, :]
                else:
                    grad += uniform[:, None]
            if CAPPED:
                capped = x / softcap
                grad *= 1.0 - capped * capped
            _store(out, out_stride, row, word - begin, grad, DESCRIPTORS, BLOCK_T, BLOCK_V)
            if NEED_BIAS:
                part = tl.cast(block, tl.int64) * out_stride + (index - begin)
                tl.store(bias_parts_ptr + part, tl.sum(grad, axis=0))

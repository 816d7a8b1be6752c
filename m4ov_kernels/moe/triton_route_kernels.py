"""The Triton kernels of ``route_topk``; ``triton_route.py`` launches them."""

from __future__ import annotations

import triton
import triton.language as tl

_NAN = tl.constexpr(0x7FFFFFFF)  # ranks before every number
_NONE = tl.constexpr(-(1 << 63))


@triton.jit
def _exponentials(x, inside):
    """e^(x - maximum), zeros outside, and their sum; NaN throughout where the maximum is infinite or NaN."""
    largest = tl.max(tl.where(inside, x, float("-inf")), axis=1)
    exponential = tl.where(inside, tl.exp(x - largest[:, None]), 0.0)
    return exponential, tl.sum(exponential, axis=1)


@triton.jit
def _ranks(x, expert, inside):
    """Larger for what comes first: by the logit, NaN before all, then the lower expert."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(x == 0.0, 0, bits)  # -0 is 0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(x != x, _NAN, ordered)
    rank = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - expert[None, :].to(tl.int64))
    return tl.where(inside, rank, _NONE)


@triton.jit(do_not_specialize=["tokens", "count", "top_k"])
def _route_topk_fwd_kernel(
    logits_ptr,  # [tokens, count], row stride given
    logits_stride,
    weights_ptr,  # fp32 [tokens, top_k]
    experts_ptr,  # int32 [tokens, top_k]
    counts_ptr,  # int32 [programs, count]
    partial_ptr,  # fp32 [programs, count]: sums of probabilities
    tokens,
    count,
    top_k,
    NORMALIZE: tl.constexpr,
    CHOSEN: tl.constexpr,  # top_k, rounded up to a power of two
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Every n-th block of tokens."""
    expert = tl.arange(0, BLOCK_E)
    place = tl.arange(0, CHOSEN)
    chosen_count = tl.zeros([BLOCK_E], tl.int32)
    probability = tl.zeros([BLOCK_E], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
        token = tl.cast(block, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (token < tokens)[:, None] & (expert < count)[None, :]
        x = tl.load(logits_ptr + token[:, None] * logits_stride + expert[None, :], mask=inside, other=0.0)
        x = x.to(tl.float32)
        exponential, total = _exponentials(x, (expert < count)[None, :])
        rank = _ranks(x, expert, (expert < count)[None, :])
        weights = tl.zeros([BLOCK_T, CHOSEN], tl.float32)
        experts = tl.zeros([BLOCK_T, CHOSEN], tl.int32)
        taken = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
        for k in range(top_k):
            best = tl.max(rank, axis=1)
            mine = rank == best[:, None]
            weight = tl.sum(tl.where(mine, exponential, 0.0), axis=1)
            number = (0x7FFFFFFF - (best & 0x7FFFFFFF)).to(tl.int32)
            here = (place == k)[None, :]
            weights = tl.where(here, weight[:, None], weights)
            experts = tl.where(here, number[:, None], experts)
            taken = tl.where(mine, 1, taken)
            rank = tl.where(mine, _NONE, rank)
        divisor = total
        if NORMALIZE:
            divisor = tl.where(total == total, tl.sum(weights, axis=1), total)
        target = token[:, None] * top_k + place[None, :]
        kept = (token < tokens)[:, None] & (place < top_k)[None, :]
        tl.store(weights_ptr + target, weights / divisor[:, None], mask=kept)
        tl.store(experts_ptr + target, experts, mask=kept)
        chosen_count += tl.sum(tl.where(inside, taken, 0), axis=0)
        probability += tl.sum(tl.where(inside, exponential / total[:, None], 0.0), axis=0)
    target = tl.cast(tl.program_id(0), tl.int64) * count + expert
    tl.store(counts_ptr + target, chosen_count, mask=expert < count)
    tl.store(partial_ptr + target, probability, mask=expert < count)


@triton.jit(do_not_specialize=["tokens", "count", "top_k"])
def _route_topk_bwd_kernel(
    logits_ptr,  # [tokens, count], row stride given
    logits_stride,
    weights_ptr,  # fp32 [tokens, top_k]
    experts_ptr,  # int32 [tokens, top_k]
    grad_weights_ptr,  # fp32 [tokens, top_k], or unused
    grad_probability_ptr,  # fp32 [count], or unused
    grad_logits_ptr,  # [tokens, count]
    tokens,
    count,
    top_k,
    NORMALIZE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_PROBABILITY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    expert = tl.arange(0, BLOCK_E)
    token = tl.cast(tl.program_id(0), tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = token < tokens
    inside = there[:, None] & (expert < count)[None, :]
    x = tl.load(logits_ptr + token[:, None] * logits_stride + expert[None, :], mask=inside, other=0.0).to(tl.float32)
    exponential, total = _exponentials(x, (expert < count)[None, :])
    p = exponential / total[:, None]
    slope = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    among = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)  # of a softmax over the chosen alone
    if HAS_PROBABILITY:
        mean_grad = tl.load(grad_probability_ptr + expert, mask=expert < count, other=0.0)
        slope += (mean_grad / tl.cast(tokens, tl.float32))[None, :]
    if HAS_WEIGHTS:
        centre = tl.zeros([BLOCK_T], tl.float32)
        if NORMALIZE:
            for k in range(top_k):
                place = token * top_k + k
                product = tl.load(grad_weights_ptr + place, mask=there, other=0.0)
                product *= tl.load(weights_ptr + place, mask=there, other=0.0)
                centre += product
        for k in range(top_k):
            slot = token * top_k + k
            grad = tl.load(grad_weights_ptr + slot, mask=there, other=0.0)
            mine = tl.load(experts_ptr + slot, mask=there, other=-1)[:, None] == expert[None, :]
            if NORMALIZE:
                share = tl.load(weights_ptr + slot, mask=there, other=0.0) * (grad - centre)
                among += tl.where(mine, share[:, None], 0.0)
            else:
                slope += tl.where(mine, grad[:, None], 0.0)
    mean = tl.sum(p * slope, axis=1)
    result = (p * (slope - mean[:, None]) + among).to(grad_logits_ptr.dtype.element_ty)
    tl.store(grad_logits_ptr + token[:, None] * count + expert[None, :], result, mask=inside)

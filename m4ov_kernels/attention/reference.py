"""The definition of attention inside sequences, in plain PyTorch: differentiable any number of times."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from m4ov_kernels.bounds import check_bounds


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """See :func:`m4ov_kernels.attention.varlen_attention`. Under ``torch.compile``, to which lengths are unknown:
    with a mask over all pairs of tokens; rows outside all sequences are NaN then."""
    if torch.compiler.is_compiling():
        return _masked(q, k, v, cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, causal, scale)
    bounds_q = check_bounds("varlen_attention", "cu_seqlens", cu_seqlens, q.shape[0])
    bounds_k = (
        bounds_q if cu_seqlens_k is None else check_bounds("varlen_attention", "cu_seqlens_k", cu_seqlens_k, k.shape[0])
    )
    outputs = [q[:0]]
    for (begin, end), (first, last) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True):
        rows, keys = end - begin, last - first
        visible = torch.ones(rows, keys, dtype=torch.bool, device=q.device)
        if causal:
            visible = visible.tril(keys - rows)
        outputs.append(_attention(q[begin:end], k[first:last], v[first:last], visible, scale))
    return torch.cat(outputs)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, causal: bool, scale: float
) -> Tensor:
    rows, keys = torch.arange(q.shape[0], device=q.device), torch.arange(k.shape[0], device=q.device)
    row_owner = torch.bucketize(rows, cu_seqlens[1:], right=True)
    key_owner = torch.bucketize(keys, cu_seqlens_k[1:], right=True)
    visible = row_owner[:, None] == key_owner
    if causal:  # both are counted from the end of their sequence
        last = len(cu_seqlens) - 1
        row_left = rows - cu_seqlens[(row_owner + 1).clamp(max=last)]
        key_left = keys - cu_seqlens_k[(key_owner + 1).clamp(max=last)]
        visible = visible & (key_left <= row_left[:, None])
    outside = (row_owner == len(cu_seqlens) - 1)[:, None, None]
    return _attention(q, k, v, visible, scale).masked_fill(outside, float("nan"))


def _attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """``[Q, H, D]``, ``[K, KV, D]`` twice, ``[Q, K]`` → ``[Q, H, D]``; probabilities in float32 or wider."""
    compute = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    queries = q.to(compute).transpose(0, 1)  # [H, Q, D]
    keys, values = (x.to(compute).repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))  # [H, K, D]
    scores = queries @ keys.mT * scale  # [H, Q, K]
    # A row that sees nothing gets zeros, not the NaN of an empty softmax.
    scores = scores.masked_fill(~visible, float("-inf")).masked_fill(~visible.any(-1, keepdim=True), 0.0)
    probabilities = torch.softmax(scores, -1).masked_fill(~visible, 0.0)
    return (probabilities @ values).transpose(0, 1).to(q.dtype)

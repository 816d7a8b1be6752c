"""The definition of attention inside sequences, in plain PyTorch: differentiable any number of times."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from m4ov_kernels.attention.bounds import check_bounds


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """See :func:`m4ov_kernels.attention.varlen_attention`."""
    bounds_q = check_bounds("cu_seqlens", cu_seqlens, q.shape[0])
    bounds_k = bounds_q if cu_seqlens_k is None else check_bounds("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    spans = zip(pairwise(bounds_q), pairwise(bounds_k), strict=True)
    outputs = [_attention(q[a:b], k[c:d], v[c:d], causal, scale) for (a, b), (c, d) in spans]
    return torch.cat([q[:0], *outputs])


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """One sequence: ``[Q, H, D]``, ``[K, KV, D]`` twice → ``[Q, H, D]``; probabilities in float32 or wider."""
    compute = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    queries = q.to(compute).transpose(0, 1)  # [H, Q, D]
    keys, values = (x.to(compute).repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))  # [H, K, D]
    scores = queries @ keys.mT * scale  # [H, Q, K]
    if causal:
        rows, columns = scores.shape[1:]
        visible = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
        # A row that sees nothing gets zeros, not the NaN of an empty softmax.
        scores = scores.masked_fill(~visible, float("-inf")).masked_fill(~visible.any(-1, keepdim=True), 0.0)
        probabilities = torch.softmax(scores, -1).masked_fill(~visible, 0.0)
    else:
        probabilities = torch.softmax(scores, -1)
    return (probabilities @ values).transpose(0, 1).to(q.dtype)

"""The definitions of the mixture-of-experts operators, in plain PyTorch: differentiable any number of times."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from m4ov_kernels.bounds import check_bounds


def route_topk(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`m4ov_kernels.moe.route_topk`; ``(weights, experts, counts, probability)``."""
    tokens, count = logits.shape
    compute = torch.promote_types(logits.dtype, torch.float32)
    probabilities = logits.to(compute).softmax(-1)
    # By logits and not by probabilities: of two that differ the exponential may make one number.
    chosen = logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = probabilities.gather(1, chosen)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    counts = torch.zeros(count, dtype=torch.int64, device=logits.device)
    counts = counts.index_add(0, chosen.flatten(), torch.ones_like(chosen).flatten())
    return weights, chosen.to(torch.int32), counts, probabilities.sum(0) / max(tokens, 1)


def permute(hidden_states: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`m4ov_kernels.moe.permute`."""
    by_expert, slots = experts.flatten().sort(stable=True)  # slot t·K + k of each row
    order = torch.empty_like(slots).scatter(0, slots, torch.arange(slots.shape[0], device=slots.device))
    bounds = torch.arange(num_experts + 1, dtype=experts.dtype, device=experts.device)
    offsets = torch.searchsorted(by_expert, bounds, out_int32=True)
    rows = hidden_states.index_select(0, slots // experts.shape[1])
    return rows, order.view(experts.shape).to(torch.int32), offsets


def unpermute(rows: Tensor, order: Tensor, weights: Tensor | None) -> Tensor:
    """See :func:`m4ov_kernels.moe.unpermute`."""
    tokens, top_k = order.shape
    compute = torch.promote_types(rows.dtype, torch.float32)
    terms = rows.index_select(0, order.flatten()).to(compute).view(tokens, top_k, rows.shape[1])
    if weights is not None:
        terms = terms * weights[..., None]
    return terms.sum(1).to(rows.dtype)


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """See :func:`m4ov_kernels.moe.grouped_linear`. Under ``torch.compile``, to which offsets are unknown: every expert
    multiplies all rows, and those outside all experts are NaN."""
    if torch.compiler.is_compiling():
        owner = torch.bucketize(torch.arange(rows.shape[0], device=rows.device), offsets[1:], right=True)
        result = rows.new_full((rows.shape[0], weight.shape[1]), torch.nan)
        for expert, matrix in enumerate(weight.unbind()):
            result = torch.where((owner == expert)[:, None], rows @ matrix.mT, result)
        return result
    bounds = check_bounds("grouped_linear", "offsets", offsets, rows.shape[0])
    # unbind, not weight[expert]: the gradient of that is as large as the weight, for every expert
    parts = [
        rows[first:end] @ matrix.mT for (first, end), matrix in zip(pairwise(bounds), weight.unbind(), strict=True)
    ]
    return torch.cat(parts)

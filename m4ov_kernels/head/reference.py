"""The definition of the head's losses, in plain PyTorch: differentiable any number of times, exact in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_kernels.head.reference_kl import linear_kl

__all__ = ["linear_kl", "linear_logprob"]


class Logprob(NamedTuple):
    """Float32 (float64 for float64) ``[T]``, 0 in ignored rows; ``top_logprobs`` and ``top_indices`` are ``[T, k]``;
    ``normalizer``, ``[2, T]``: the log-sum-exp in two parts, without a gradient."""

    logprob: Tensor
    logsumexp: Tensor
    entropy: Tensor
    total: Tensor
    top_logprobs: Tensor
    top_indices: Tensor
    normalizer: Tensor


def linear_logprob(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    rounded: bool,
    top_k: int,
    first: int = 0,
    want_entropy: bool = True,
    want_total: bool = True,
) -> Logprob:
    """``first``: where the rows of ``weight`` begin in the vocabulary that targets and indices are of; the
    log-probability of a target that is not among them is 0. ``rounded``: logits, and their quotient by the temperature,
    are rounded to the dtype of ``hidden_states``, as a model rounds them that has them in memory; else they are float32
    (float64 for float64) from the start. An entropy or a total that nobody wants is empty."""
    kept = targets != ignore_index
    hidden_states = torch.where(kept[:, None], hidden_states, 0.0)  # a NaN in such a row reaches no gradient
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    if not rounded:
        hidden_states, weight = hidden_states.to(wide), weight.to(wide)
        bias = None if bias is None else bias.to(wide)
    logits = F.linear(hidden_states, weight, bias)
    if temperature != 1.0:
        logits = logits / temperature
    logits = logits.to(wide)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logsumexp = logits.logsumexp(-1)
    log_p = logits.log_softmax(-1)
    here = kept & (targets >= first) & (targets < first + weight.shape[0])
    index = torch.where(here, targets - first, 0)[:, None]
    largest = logits.detach().amax(-1)
    entropy = total = logits.new_empty(0)
    top_indices = targets.new_empty(len(targets), 0)
    if want_entropy:
        entropy = -(log_p.exp() * log_p.clamp_min(-1e30)).sum(-1)  # not 0 · -inf
    if want_total:
        total = (logits if class_weight is None else logits * class_weight.to(wide)).sum(-1)
    if top_k:
        top_indices = logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]

    def of_kept(values: Tensor) -> Tensor:
        return torch.where(kept.view(-1, *[1] * (values.ndim - 1)), values, 0)

    return Logprob(
        torch.where(here, log_p.gather(1, index)[:, 0], 0),
        of_kept(logsumexp),
        of_kept(entropy) if want_entropy else entropy,
        of_kept(total) if want_total else total,
        of_kept(log_p.detach().gather(1, top_indices)),
        of_kept(top_indices + first),
        torch.where(kept, torch.stack((largest, logsumexp.detach() - largest)), 0),
    )

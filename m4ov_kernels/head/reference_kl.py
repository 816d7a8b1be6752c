"""The definition of ``linear_kl``, in plain PyTorch: differentiable any number of times, exact in float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_kl(
    hidden_states: Tensor,
    weight: Tensor,
    ref_hidden_states: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    kind: str,
    temperature: float,
    rounded: bool,
) -> Tensor:
    """Float32 (float64 for float64) ``[T]``, 0 where ``mask`` is False. ``rounded``: as in
    :func:`m4ov_kernels.head.reference.linear_logprob`. A word whose weight is 0 adds 0."""
    if mask is not None:  # a NaN in such a row reaches no gradient
        hidden_states, ref_hidden_states = (
            torch.where(mask[:, None], x, 0.0) for x in (hidden_states, ref_hidden_states)
        )
    log_p = _log_probabilities(hidden_states, weight, bias, temperature, rounded)
    with torch.no_grad():
        log_q = _log_probabilities(ref_hidden_states, ref_weight, ref_bias, temperature, rounded)
        wide = torch.promote_types(log_p.dtype, log_q.dtype)
    log_p, log_q = log_p.to(wide), log_q.to(wide)
    if kind == "forward":
        found = _divergence(log_q, log_p)
    elif kind == "reverse":
        found = _divergence(log_p, log_q)
    else:
        # Where both are 0, so is their mean, whose logarithm has no gradient.
        nowhere = (log_p == -math.inf) & (log_q == -math.inf)
        log_m = torch.logaddexp(log_p.masked_fill(nowhere, 0.0), log_q.masked_fill(nowhere, 0.0)) - math.log(2.0)
        found = (_divergence(log_p, log_m) + _divergence(log_q, log_m)) / 2
    return found if mask is None else torch.where(mask, found, 0.0)


def _log_probabilities(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, rounded: bool
) -> Tensor:
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    if not rounded:
        hidden_states, weight = hidden_states.to(wide), weight.to(wide)
        bias = None if bias is None else bias.to(wide)
    logits = F.linear(hidden_states, weight, bias)
    if temperature != 1.0:
        logits = logits / temperature
    return logits.to(wide).log_softmax(-1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p ‖ q)``, ``[T]``."""
    p = log_p.exp()
    nothing = p == 0
    gap = log_p.masked_fill(nothing, 0.0) - log_q.masked_fill(nothing, 0.0)
    return (p * gap).sum(-1)

"""From the running state of a softmax to results, and from their gradients to the coefficients of the logits' gradient.

Every implementation makes the same state, float32 ``[5, T]``: the largest logit; the sum of ``exp(x - largest)``; the
target's logit (0 where it is not here); the sum of ``exp(x - largest) · (x - largest)``; the (weighted) sum of logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m4ov_kernels.head.rows import Rows

STATES = 5
TOKENS = 64  # that the compiled kernels take together


class Results(NamedTuple):
    """Float32 ``[T]``; ``entropy``, ``total``: empty where nobody asked. ``normalizer``, ``[2, T]``: the log-sum-exp in
    two parts, the largest logit and the log of the sum of ``exp(x - largest)``: one float32 for both would cost
    logits of 60 two decimal digits of their probabilities."""

    logprob: Tensor
    logsumexp: Tensor
    entropy: Tensor
    total: Tensor
    normalizer: Tensor


def logits_dtype(hidden_states: Tensor, rounded: bool, softcap: float | None) -> torch.dtype:
    """In which they are kept."""
    return hidden_states.dtype if rounded and not softcap else torch.float32


def count_of_logits(tokens: int, weight: Tensor) -> int:
    """That are kept of so many tokens, if all are."""
    return -(-tokens // TOKENS) * TOKENS * weight.shape[0]


def room_for_logits(
    hidden_states: Tensor, weight: Tensor, num_valid: int | None, rounded: bool, softcap: float, keep_logits_bytes: int
) -> Tensor:
    """Where the forward keeps logits for the backward: as they are, rounded or float32, at most those of all rows that
    count."""
    dtype = logits_dtype(hidden_states, rounded, softcap)
    whole = count_of_logits(hidden_states.shape[0] if num_valid is None else num_valid, weight)
    return hidden_states.new_empty(min(keep_logits_bytes // dtype.itemsize, whole), dtype=dtype)


def finish(state: Tensor, here: Tensor | None, want_entropy: bool, want_total: bool) -> Results:
    """``here``: which targets are in this part of the vocabulary (all, if ``None``); others have log-probability 0."""
    largest, exponentials, hit, centred, total = state.unbind()
    # An infinite logit: its log-sum-exp is infinite, and nothing has a probability.
    log_sum = exponentials.log()
    logsumexp = largest + log_sum
    log_sum = log_sum.masked_fill(log_sum == math.inf, math.nan)
    logprob = (hit - largest) - log_sum
    if here is not None:
        logprob = torch.where(here, logprob, 0.0)
    entropy = log_sum - centred / exponentials if want_entropy else state.new_empty(0)
    normalizer = torch.stack((largest, log_sum))
    return Results(logprob, logsumexp, entropy, total.clone() if want_total else state.new_empty(0), normalizer)


@torch.no_grad()
def coefficients(
    rows: Rows,
    grads: Sequence[Tensor | None],
    normalizer: Tensor,
    entropy: Tensor,
    here: Tensor | None,
    temperature: float,
) -> Tensor:
    """``grads``: of log-probability, log-sum-exp, entropy and total; they, ``normalizer`` and ``entropy`` are of all
    rows, of which those of ``rows`` are taken.

    Float32 ``[6, T]``: shift, log_sum, constant, linear, hit, uniform. With log p = (x - shift) - log_sum, the
    gradient of a logit x is p · (constant + linear · log p) + uniform · class weight, and ``hit`` more at the target;
    that of an entropy H is -p · (log p + H)."""
    grad_logprob, grad_logsumexp, grad_entropy, grad_total = (None if g is None else rows.take(g) for g in grads)
    shift, log_sum = rows.take(normalizer).unbind()
    none = torch.zeros_like(shift)
    hit = none if grad_logprob is None else grad_logprob if here is None else torch.where(here, grad_logprob, 0.0)
    constant, linear = -hit, none
    if grad_logsumexp is not None:
        constant = constant + grad_logsumexp
    if grad_entropy is not None:
        constant, linear = constant - grad_entropy * rows.take(entropy), -grad_entropy
    uniform = none if grad_total is None else grad_total
    gradients = [constant, linear, hit, uniform]
    if temperature != 1.0:
        gradients = [gradient / temperature for gradient in gradients]
    return torch.stack((shift, log_sum, *gradients))

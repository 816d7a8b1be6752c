"""What a head says of its targets, with logits in memory: the definition, in the dtype that comes; and what cancels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .numerics import logit_terms

NAMES = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def logits_of(hidden, weight, bias, temperature=1.0, softcap=None, scale=1.0) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def scored(hidden, weight, bias, targets, temperature=1.0, softcap=None, scale=1.0) -> tuple[Tensor, ...]:
    """:data:`NAMES`; the last three without gradients."""
    logits = logits_of(hidden, weight, bias, temperature, softcap, scale)
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    kept = (2 * log_p).logsumexp(-1), logits.mean(-1), log_p.argmax(-1) == targets
    return log_p.gather(1, targets[:, None])[:, 0], entropy, *(value.detach() for value in kept)


def terms(hidden, weight, bias, targets, grads, temperature=1.0, softcap=None, scale=1.0) -> dict[str, Tensor]:
    """What nearly cancels, in float64, as for ``linear_logprob`` (``operators/head.py``). ``grads``: of the
    log-probabilities and of the entropies, ``[N]``."""
    hidden, weight, *grads = (value.detach().double() for value in (hidden, weight, *grads))
    bias = None if bias is None else bias.double()
    logits = logits_of(hidden, weight, bias, temperature, softcap, scale)
    largest = (logit_terms(hidden, weight, bias) * scale / temperature).amax(-1)
    log_vocab = math.log(len(weight)) / 4
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    spread = (p * (log_p + entropy[:, None]).abs()).sum(-1)
    of_logprob, of_entropy = (grad.abs()[:, None] for grad in grads)
    shares = p * (of_logprob + of_entropy * (log_p.abs() + entropy[:, None] + 1)) * (1 + largest)[:, None]
    shares = (shares + F.one_hot(targets, len(weight)) * of_logprob) * scale / temperature
    return {
        "log_probs": largest + log_vocab,
        "entropy": largest * spread + entropy + log_vocab,
        "log_sum_sq_probs": 2 * largest + log_vocab,
        "mean_logits": logits.abs().mean(-1),
        "hidden": shares @ weight.abs(),
        "weight": shares.t() @ hidden.abs(),
        "bias": shares.sum(0),
    }

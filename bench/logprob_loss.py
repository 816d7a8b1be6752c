"""A loss over log-probabilities and entropies: ours, its definition, and as trainers have it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from m4ov_kernels import linear_logprob
from m4ov_kernels.head import reference

IGNORE = -100
ENTROPY = 0.01  # its weight in the loss


def _loss(logprob: Tensor, entropy: Tensor | None, targets: Tensor) -> Tensor:
    total = -logprob.sum() if entropy is None else -(logprob + ENTROPY * entropy).sum()
    return total / (targets != IGNORE).sum()


def ours(entropy: bool, hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    found = linear_logprob(hidden_states, weight, targets, entropy=entropy)
    return _loss(found.logprob, found.entropy, targets)


def definition(entropy: bool, hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """In plain PyTorch, with float32 logits (float64 of float64)."""
    found = reference.linear_logprob(hidden_states, weight, targets, None, None, 1.0, 0.0, IGNORE, False, 0)
    return _loss(found.logprob, found.entropy if entropy else None, targets)


def eager(entropy: bool, hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As trainers have it: logits in the model's dtype, then float32."""
    log_p = F.log_softmax(F.linear(hidden_states, weight).float(), -1)
    kept = targets != IGNORE
    logprob = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0] * kept
    return _loss(logprob, -(log_p.exp() * log_p).sum(-1) * kept if entropy else None, targets)

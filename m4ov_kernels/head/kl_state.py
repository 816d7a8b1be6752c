"""From the running state of two softmaxes to a divergence, and from its gradient to that of the logits.

Every implementation of ``linear_kl`` makes the same state, float32 ``[5, T]``: the largest logit and the sum of
``exp(logit - largest)`` of a first head's logits x and of a second's, y; and the sum of ``exp(x - largest x) ·
((x - largest x) - (y - largest y))``, whose parts are small where the heads are alike. The first head is the one whose
distribution the divergence is a mean over. The symmetric divergence takes another pass over the vocabulary, with both
normalisers known.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from m4ov_kernels.head.rows import Rows, computed_rows

STATES, JSD_STATES, NORMALIZERS, COEFFICIENTS = 5, 2, 5, 6
KINDS = ("forward", "reverse", "jsd")
_OP, _IGNORE = "linear_kl", -1


def rows_of(hidden_states: Tensor, mask: Tensor | None, num_valid: int | None, on_host: bool) -> Rows:
    """See :func:`m4ov_kernels.head.rows.computed_rows`; the target of a row that counts is 0."""
    target = torch.zeros(hidden_states.shape[0], dtype=torch.int64, device=hidden_states.device)
    if mask is None:
        return Rows(hidden_states, target, None, None)
    target = target.masked_fill_(~mask, _IGNORE)
    return computed_rows(_OP, "mask", hidden_states, target, 1, _IGNORE, num_valid, on_host)


def of_rows(rows: Rows, hidden_states: Tensor) -> Tensor:
    """Another head's hidden states in the same rows."""
    return hidden_states if rows.index is None else hidden_states.index_select(0, rows.index)


def reference_first(kind: str) -> bool:
    return kind == "forward"


def finish(kind: str, state: Tensor, sums_of_jsd: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The divergence, float32 ``[T]``, never below 0; and float32 ``[5, T]`` for the backward: the log-sum-exp of the
    policy in two parts, the largest logit and the log of the sum; that of the reference; and the mean of log p less the
    other logarithm, which makes the gradient of a row sum to 0.

    ``sums_of_jsd``: of both log-sum-exps, ``[4, T]``, makes ``[2, T]``: the divergence, and ``KL(p ‖ m)``.
    """
    largest, exponentials, other_largest, other_exponentials, gap = state
    log_sum, other_log_sum = exponentials.log(), other_exponentials.log()
    mean = gap / exponentials - (log_sum - other_log_sum)
    # Of an infinite logit nothing has a probability.
    log_sum, other_log_sum = (x.masked_fill(x == math.inf, math.nan) for x in (log_sum, other_log_sum))
    nothing = 0.0 * (log_sum + other_log_sum)  # or NaN
    mean = mean + nothing
    parts = [largest, log_sum, other_largest, other_log_sum]
    if reference_first(kind):
        parts = [*parts[2:], *parts[:2]]
    both = torch.stack(parts)
    if kind != "jsd":
        return mean.clamp_min(0.0), torch.cat((both, mean[None]))
    divergence, offset = sums_of_jsd(both) + nothing
    return divergence, torch.cat((both, offset[None]))


@torch.no_grad()
def coefficients(rows: Rows, kind: str, grad: Tensor, normalizer: Tensor, temperature: float) -> Tensor:
    """Float32 ``[6, T]``: shift and log-sum of the policy, those of the reference, scale, offset. The gradient of a
    policy's logit is scale · (p - q), scale · p · (log p - log q - offset) or scale · p · (log p - log m - offset)."""
    scale = rows.take(grad) * ((0.5 if kind == "jsd" else 1.0) / temperature)
    normalizer = rows.take(normalizer)
    return torch.cat((normalizer[:4], scale[None], normalizer[4:]))

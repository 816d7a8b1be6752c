"""Importance weights for rollouts whose sampler computed other log-probabilities than the trainer does."""

from __future__ import annotations

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.head.losses.kl import ratio
from m4ov_kernels.head.losses.rows import Rows, option, packed_rows

_OP = "rollout_weights"
KINDS = ("tis", "icepop", "mis")
LEVELS = ("token", "sequence", "geometric")
_BOUNDS = {"tis": (0.0, 2.0), "icepop": (0.5, 5.0), "mis": (0.0, 2.0)}


def rollout_weights(
    logprob: Tensor,
    rollout_logprob: Tensor,
    cu_seqlens: Tensor,
    *,
    kind: str = "tis",
    level: str = "token",
    low: float | None = None,
    high: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Weights ``w = π_train / π_rollout``, truncated or masked, which put right what sampler and trainer differ by.

    Args:
        logprob: ``[T]`` float32 or float64, of the trainer's policy that was sampled from (before any step).
        rollout_logprob: ``[T]``, of the same words as the sampler computed them.
        cu_seqlens: ``[n + 1]`` int32 or int64: sequence ``i`` has the rows ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``.
        kind: ``"tis"``: ``min(w, high)``, C = 2. ``"icepop"``: ``w`` within ``[low, high]`` and 0 outside, with 0.5 and
            5. ``"mis"``: the same with 0 and 2: only what is too likely in the trainer is dropped.
        level: of which ``w``: ``"token"``; ``"sequence"``: the product over a sequence, for each of its tokens;
            ``"geometric"``: that product's root of the number of tokens.
        low, high: other bounds than the kind's.
        mask: bool ``[T]``, True in rows that count.

    Returns:
        ``[T]`` of the dtype of ``logprob``, detached; 0 in ignored rows.

    ``log w`` is cut at ±20 (a product's, after the product).

    Raises:
        TypeError, ValueError: naming argument, what was expected and what came; see :func:`policy_loss`.

    Source: truncated importance sampling: Yao et al., "Your efficient RL framework secretly brings you off-policy RL
    training", 2025. IcePop: Ling Team, "Small leak can sink a great ship", 2025.
    """
    low, high = bounds(_OP, "", kind, level, low, high)
    rows = packed_rows(_OP, logprob, cu_seqlens, mask, rollout_logprob=rollout_logprob)
    log_ratio = rows.kept(logprob.detach()) - rows.kept(rollout_logprob.detach(), logprob.dtype)
    return rows.kept(rows.segments.or_nan(weights(rows, log_ratio, kind, level, low, high)[0]))


def bounds(
    operator: str, prefix: str, kind: str, level: str, low: float | None, high: float | None
) -> tuple[float, float]:
    checks.one_of(operator, prefix + "level", level, LEVELS)
    checks.one_of(operator, prefix.removesuffix("_") or "kind", kind, KINDS)
    if kind == "tis" and low is not None:
        checks.refuse(ValueError, operator, prefix + "low", 'None with "tis", which has no lower bound', repr(low))
    default_low, default_high = _BOUNDS[kind]
    low, high = default_low if low is None else low, default_high if high is None else high
    option(operator, prefix + "low", low)
    option(operator, prefix + "high", high)
    if not low <= high or high == 0:
        checks.refuse(
            ValueError, operator, prefix + "high", f"above 0, and at least {low:g}, the low bound", repr(high)
        )
    return float(low), float(high)


def weights(rows: Rows, log_ratio: Tensor, kind: str, level: str, low: float, high: float) -> tuple[Tensor, Tensor]:
    """One a row, and where a bound was in force. ``log_ratio`` is detached."""
    if level != "token":
        per_sequence = rows.sums(log_ratio) if level == "sequence" else rows.means(log_ratio)
        log_ratio = rows.segments.spread(per_sequence).to(log_ratio.dtype)
    found = ratio(log_ratio)
    if kind == "tis":
        return found.clamp(max=high), found > high
    outside = (found < low) | (found > high)
    return torch.where(outside, 0.0, found), outside

"""Estimators of the Kullback-Leibler divergence, a token, from the log-probabilities of the sampled words."""

from __future__ import annotations

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.head.losses.rows import float_rows

_OP = "kl_estimate"
KINDS = ("k1", "k2", "k3")
# e^20 = 4.9e8: beyond any bound, and far from overflow in float32, also squared.
LARGEST_LOG_RATIO = 20.0


def ratio(log_ratio: Tensor) -> Tensor:
    """``exp``, constant (so without gradient) beyond ±20: never infinite, so never ``inf · 0``."""
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def kl_estimate(logprob: Tensor, ref_logprob: Tensor, *, kind: str = "k3") -> Tensor:
    """Estimate ``KL(π ‖ π_ref)`` at each token that was sampled from π. With ``d = log π_ref − log π``:

    - ``"k1"``: ``−d``. Unbiased, noisy, may be negative. As a loss its gradient is that of ``log π``, which is zero on
      average: subtract it from rewards instead.
    - ``"k2"``: ``d²/2``. Biased, small noise; its gradient is, on policy, that of the true divergence.
    - ``"k3"``: ``e^d − d − 1``. Unbiased, never negative, small noise. ``d`` is cut at ±20, beyond which there is no
      gradient.

    Args:
        logprob: ``[...]`` float32 or float64, in nats; differentiable.
        ref_logprob: the same shape; detached.
        kind: as above.

    Returns:
        ``[...]`` of the dtype of ``logprob``, in nats.

    Raises:
        TypeError: a tensor is not float32 or float64.
        ValueError: shapes differ, or ``kind`` is unknown.

    Source: Schulman, "Approximating KL divergence", 2020; k3 in the loss: GRPO, arXiv 2402.03300.
    """
    checks.one_of(_OP, "kind", kind, KINDS)
    float_rows(_OP, "logprob", logprob)
    float_rows(_OP, "ref_logprob", ref_logprob)
    if ref_logprob.shape != logprob.shape:
        checks.refuse(ValueError, _OP, "ref_logprob", f"{list(logprob.shape)}, as logprob", list(ref_logprob.shape))
    return divergence(logprob, ref_logprob.detach().to(logprob.dtype), kind)


def divergence(logprob: Tensor, ref_logprob: Tensor, kind: str) -> Tensor:
    """:func:`kl_estimate` of checked arguments."""
    d = ref_logprob - logprob
    if kind == "k1":
        return -d
    if kind == "k2":
        return d.square() / 2
    # expm1: near 0, where policies start, e^d − 1 − d would be all rounding.
    d = d.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return torch.expm1(d) - d

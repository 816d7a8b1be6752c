"""What people watch of a step: 0-dim float32 tensors on the device, from what the loss has in hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_kernels.head.losses.kl import divergence, ratio
from m4ov_kernels.head.losses.rows import Rows

Metrics = dict[str, Tensor]


class Statistics:
    """Of the rows that count; 0 where there are none."""

    def __init__(self, rows: Rows) -> None:
        self.mask = rows.mask
        self.tokens = rows.counts.sum()
        self.sequences = (rows.counts > 0).sum()

    def total(self, values: Tensor) -> Tensor:
        return torch.where(self.mask, values, 0.0).sum(dtype=torch.float64)

    def mean(self, values: Tensor) -> Tensor:
        return self.total(values) / self.tokens.clamp(min=1)

    def largest(self, values: Tensor) -> Tensor:
        return torch.where(self.tokens > 0, self._filled(values, -float("inf")).amax(), 0.0)

    def smallest(self, values: Tensor) -> Tensor:
        return torch.where(self.tokens > 0, self._filled(values, float("inf")).amin(), 0.0)

    def _filled(self, values: Tensor, value: float) -> Tensor:
        return F.pad(torch.where(self.mask, values, value), (0, 1), value=value)  # one more: nothing has no maximum

    def effective_sample_size(self, weights: Tensor) -> Tensor:
        """``(Σw)² / (N Σw²)``: the share of the N tokens that equal weights would need for the same variance."""
        squares = self.total(weights.double().square())
        return self.total(weights).square() / (self.tokens * squares).clamp(min=1e-300)


def finished(metrics: Metrics) -> Metrics:
    return {name: value.detach().float() for name, value in metrics.items()}


def of_ratio(found: Statistics, log_ratio: Tensor, weights: Tensor, low: Tensor, high: Tensor) -> Metrics:
    """``log_ratio``: of each token's probability to what it was. ``weights``: the ratio that the loss uses. ``low``,
    ``high``: where it was clipped."""
    return {
        "ratio_mean": found.mean(weights),
        "ratio_min": found.smallest(weights),
        "ratio_max": found.largest(weights),
        "clip_fraction_low": found.mean(low),
        "clip_fraction_high": found.mean(high),
        "policy_kl_k1": found.mean(-log_ratio),
        "policy_kl_k3": found.mean(divergence(-log_ratio, torch.zeros_like(log_ratio), "k3")),
        "effective_sample_size": found.effective_sample_size(weights),
    }


def of_mismatch(found: Statistics, log_ratio: Tensor, weights: Tensor | None, capped: Tensor | None) -> Metrics:
    """``log_ratio``: of each token's probability in the trainer to that in the sampler; ``weights`` made of it."""
    size = log_ratio.abs()
    plain = ratio(log_ratio)
    metrics = {
        "mismatch_mean": found.mean(size),
        "mismatch_max": found.largest(size),
        "mismatch_k3": found.mean(divergence(-log_ratio, torch.zeros_like(log_ratio), "k3")),
        "rollout_effective_sample_size": found.effective_sample_size(plain if weights is None else weights),
    }
    if weights is not None and capped is not None:
        metrics["rollout_weight_mean"] = found.mean(weights)
        metrics["rollout_dropped"] = found.mean(weights == 0)
        metrics["rollout_capped"] = found.mean(capped)
    return metrics

"""``dpo_loss`` and ``mpo_loss``: preferences between pairs of responses, on packed rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.head.losses import rows as packed
from m4ov_kernels.head.losses.metrics import Metrics, finished
from m4ov_kernels.head.losses.rows import Rows, option


def dpo_loss(
    logprob: Tensor,
    ref_logprob: Tensor,
    cu_seqlens: Tensor,
    *,
    normalizer: float | Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimisation: the sum over pairs of ``−(1 − ε) log σ(h) − ε log σ(−h)``, over ``normalizer``.

    ``h = β(Δ_w − Δ_l)``; Δ is the sum over a response's tokens of ``log π − log π_ref``, w the chosen response, l the
    rejected one.

    Args:
        logprob: ``[T]`` float32 or float64, nats, as :func:`linear_logprob` gives them; differentiable.
        ref_logprob: ``[T]``, of the reference policy; detached.
        cu_seqlens: ``[2P + 1]`` int32 or int64 bounds of P pairs: sequence ``2p`` is the chosen response of pair ``p``
            and ``2p + 1`` the rejected one. Starts at 0, never falls, ends at ``T``.
        normalizer: the number of pairs in the whole step, of all micro-batches and ranks (see :func:`policy_loss`).
        beta: β, above 0.
        label_smoothing: ε, from 0 to 0.5: the share of pairs taken to be labelled the wrong way round.
        mask: bool ``[T]``, True in rows that count; others may hold anything. A pair of which nothing counts is absent.

    Returns:
        The loss: a scalar of the dtype of ``logprob``. And metrics, 0-dim float32 tensors, detached:

        - ``loss``, with the normaliser, and ``dpo_loss``, its only part: these add up. ``pairs``, ``tokens``: how many
          count. The others are means over pairs, 0 where there are none;
        - ``reward_chosen``, ``reward_rejected``: βΔ; ``reward_margin``: their difference; ``reward_accuracy``: the
          share of pairs with a positive margin (half for 0);
        - ``logprob_chosen``, ``logprob_rejected``: of whole responses; ``kl_k1``: mean of ``log π − log π_ref`` over
          the tokens;
        - ``reward_sum``, ``reward_count``: over both responses of all pairs here, for :class:`RewardMean`.

    Saves for backward, determinism, errors: as :func:`policy_loss`.

    Source: Rafailov et al., arXiv 2305.18290; label smoothing: Mitchell, "A note on DPO with noisy preferences", 2023.
    """
    pairs = _Pairs("dpo_loss", logprob, ref_logprob, cu_seqlens, normalizer, beta, mask)
    option("dpo_loss", "label_smoothing", label_smoothing, 0.0, 0.5)
    loss = pairs.metrics["dpo_loss"] = pairs.total(_sigmoid(pairs, label_smoothing))
    pairs.metrics["loss"] = loss
    return loss.to(logprob.dtype), finished(pairs.metrics)


def mpo_loss(
    logprob: Tensor,
    ref_logprob: Tensor,
    cu_seqlens: Tensor,
    *,
    normalizer: float | Tensor,
    delta: float | Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    dpo_weight: float = 0.8,
    bco_weight: float = 0.2,
    sft_weight: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mixed preference optimisation: ``0.8 · DPO + 0.2 · BCO + 1.0 · SFT``, sums over pairs, over ``normalizer``.

    - DPO: preference, as :func:`dpo_loss`;
    - BCO: quality, each response by itself: ``−log σ(βΔ_w − δ) − log σ(−(βΔ_l − δ))``;
    - SFT: generation: ``−`` the mean of ``log π`` over the chosen response's tokens that count.

    Args:
        logprob, ref_logprob, cu_seqlens, normalizer, beta, label_smoothing, mask: as :func:`dpo_loss`.
        delta: δ, the moving average of rewards ``βΔ``: a number, or a tensor with one element; detached.
            :class:`RewardMean` keeps it. It must be the same in all micro-batches and on all ranks of a step, so it is
            moved once a step, not here.
        dpo_weight, bco_weight, sft_weight: 0 or more.

    Returns:
        As :func:`dpo_loss`, with the parts ``dpo_loss``, ``bco_loss`` and ``sft_loss`` before their weights, and
        ``delta``.

    Source: MPO, arXiv 2411.10442; BCO, arXiv 2404.04656.
    """
    pairs = _Pairs("mpo_loss", logprob, ref_logprob, cu_seqlens, normalizer, beta, mask)
    option("mpo_loss", "label_smoothing", label_smoothing, 0.0, 0.5)
    delta = packed.one_number("mpo_loss", "delta", delta, logprob.device)
    weights = {"dpo": dpo_weight, "bco": bco_weight, "sft": sft_weight}
    for name, weight in weights.items():
        option("mpo_loss", f"{name}_weight", weight)
    chosen, rejected = pairs.rewards
    parts = {
        "dpo": _sigmoid(pairs, label_smoothing),
        "bco": -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected),
        "sft": -pairs.rows.means(pairs.logprob).view(-1, 2)[:, 0],
    }
    loss: Tensor | float = 0.0
    for name, part in parts.items():
        pairs.metrics[f"{name}_loss"] = pairs.total(part)
        loss = loss + weights[name] * pairs.metrics[f"{name}_loss"]
    assert isinstance(loss, Tensor)
    pairs.metrics |= {"loss": loss, "delta": torch.zeros_like(loss) + delta}
    return loss.to(logprob.dtype), finished(pairs.metrics)


@dataclass(frozen=True)
class RewardMean:
    """The moving average δ of :func:`mpo_loss`: a decayed sum of rewards over a decayed count, 0-dim float64 tensors.

    After a step, with the metrics of its micro-batches summed, and over ranks by an all-reduce::

        state = state.update(reward_sum, reward_count)  # then mpo_loss(..., delta=state.delta) in the next step

    Immutable: keep the latest, and save both tensors in a checkpoint.
    """

    total: Tensor
    count: Tensor

    @classmethod
    def start(cls, device: torch.device | str | None = None) -> RewardMean:
        """Of no rewards yet: δ is 0."""
        return cls(*torch.zeros(2, dtype=torch.float64, device=device))

    @property
    def delta(self) -> Tensor:
        return torch.where(self.count > 0, self.total / self.count.clamp(min=1e-300), 0.0)

    def update(self, reward_sum: float | Tensor, reward_count: float | Tensor, *, decay: float = 1.0) -> RewardMean:
        """With a step's rewards. ``decay``: what the past still weighs, from 0 to 1; 1 is the mean of all so far."""
        option("RewardMean.update", "decay", decay, 0.0, 1.0)
        return RewardMean(self.total * decay + reward_sum, self.count * decay + reward_count)


class _Pairs:
    """Checked arguments, the rewards of both responses of each pair, and the metrics that come with them."""

    def __init__(
        self, operator: str, logprob: Any, ref_logprob: Any, cu_seqlens: Any, normalizer: Any, beta: Any, mask: Any
    ) -> None:
        packed.float_rows(operator, "ref_logprob", ref_logprob)
        self.rows: Rows = packed.packed_rows(operator, logprob, cu_seqlens, mask, ref_logprob=ref_logprob)
        if cu_seqlens.shape[0] % 2 == 0:
            expected = "[2P + 1]: bounds of a chosen and a rejected response of each pair"
            checks.refuse(ValueError, operator, "cu_seqlens", expected, list(cu_seqlens.shape))
        option(operator, "beta", beta)
        if beta == 0:
            checks.refuse(ValueError, operator, "beta", "above 0", repr(beta))
        self.divisor = packed.normalizer(operator, normalizer, logprob.device)
        self.logprob = self.rows.kept(logprob)
        log_ratio = self.logprob - self.rows.kept(ref_logprob.detach(), logprob.dtype)
        rewards = beta * self.rows.sums(log_ratio).view(-1, 2)
        self.rewards = rewards.unbind(1)
        self.present = self.rows.counts.view(-1, 2).sum(1) > 0
        self.metrics = self._watched(rewards.detach(), log_ratio.detach())

    def total(self, values: Tensor) -> Tensor:
        """Of each pair's value, over the normaliser."""
        kept = torch.where(self.present, values, 0.0)
        return self.rows.segments.or_nan(kept.sum()) / self.divisor

    def _watched(self, rewards: Tensor, log_ratio: Tensor) -> Metrics:
        pairs, tokens = self.present.sum(), self.rows.counts.sum()
        chosen, rejected = rewards.unbind(1)
        of_policy = self.rows.sums(self.logprob.detach()).view(-1, 2).unbind(1)

        def mean(values: Tensor) -> Tensor:
            return torch.where(self.present, values, 0.0).sum() / pairs.clamp(min=1)

        margin = chosen - rejected
        return {
            "pairs": pairs,
            "tokens": tokens,
            "reward_chosen": mean(chosen),
            "reward_rejected": mean(rejected),
            "reward_margin": mean(margin),
            "reward_accuracy": mean((margin.sign() + 1) / 2),
            "reward_sum": torch.where(self.present, chosen + rejected, 0.0).sum(),
            "reward_count": 2 * pairs,
            "logprob_chosen": mean(of_policy[0]),
            "logprob_rejected": mean(of_policy[1]),
            "kl_k1": log_ratio.sum(dtype=torch.float64) / tokens.clamp(min=1),
        }


def _sigmoid(pairs: _Pairs, label_smoothing: float) -> Tensor:
    chosen, rejected = pairs.rewards
    margin = chosen - rejected
    loss = -(1 - label_smoothing) * F.logsigmoid(margin)
    return loss - label_smoothing * F.logsigmoid(-margin) if label_smoothing else loss

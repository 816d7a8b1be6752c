"""The losses as their papers write them: padded ``[B, L]``, a loop over sequences, a loop over tokens. And batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Aggregation and bounds of the ratio, as the papers have them.
PAPER = {
    "grpo": ("sequence", 0.8, 1.2),
    "dr_grpo": ("token", 0.8, 1.2),
    "dapo": ("token", 0.8, 1.28),
    "gspo": ("sequence", 1 - 3e-4, 1 + 4e-4),
    "cispo": ("token", -math.inf, 5.0),
}
KINDS = tuple(PAPER)
ROWS = ("logprob", "old_logprob", "ref_logprob", "rollout_logprob", "entropy", "exact_kl")


@dataclass
class Batch:
    """``rows``: of each name in ``ROWS``, ``[T]``, NaN in rows that do not count."""

    rows: dict[str, Tensor]
    mask: Tensor
    lengths: list[int]
    advantages: Tensor
    token_advantages: Tensor

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0)

    def __getitem__(self, name: str) -> Tensor:
        return self.rows[name]

    def to(self, dtype: torch.dtype) -> Batch:
        rows = {name: values.to(dtype) for name, values in self.rows.items()}
        return Batch(rows, self.mask, self.lengths, self.advantages.to(dtype), self.token_advantages.to(dtype))

    def part(self, first: int, last: int) -> Batch:
        start, end = sum(self.lengths[:first]), sum(self.lengths[:last])
        rows = {name: values[start:end] for name, values in self.rows.items()}
        per_token = self.token_advantages[start:end]
        return Batch(rows, self.mask[start:end], self.lengths[first:last], self.advantages[first:last], per_token)

    def tokens(self) -> int:
        return int(self.mask.sum())


def batch(lengths: list[int], dtype: torch.dtype = torch.float64, keep: float = 0.8) -> Batch:
    """Log-probabilities near one another, so that some ratios are clipped and most are not."""
    total, count = sum(lengths), len(lengths)
    mask = torch.rand(total) < keep
    old = -3 * torch.rand(total, dtype=torch.float64) - 0.01
    rows = {
        "old_logprob": old,
        "logprob": old + 0.3 * torch.randn(total, dtype=torch.float64),
        "ref_logprob": old + 0.5 * torch.randn(total, dtype=torch.float64),
        "rollout_logprob": old + 0.5 * torch.randn(total, dtype=torch.float64),
        "entropy": 2 * torch.rand(total, dtype=torch.float64),
        "exact_kl": torch.rand(total, dtype=torch.float64),
    }
    rows = {name: torch.where(mask, values, math.nan).to(dtype) for name, values in rows.items()}
    per_token = torch.where(mask, torch.randn(total, dtype=torch.float64), math.nan)
    return Batch(rows, mask, lengths, torch.randn(count).to(dtype), per_token.to(dtype))


def padded(values: Tensor, lengths: list[int]) -> Tensor:
    """``[T]`` to ``[B, L]``, with 0 in padding and where there was NaN."""
    longest = max(lengths, default=0)
    if values.is_floating_point():
        values = values.nan_to_num()
    parts = [F.pad(part, (0, longest - len(part))) for part in values.split(lengths)]
    return torch.stack(parts) if parts else values.new_zeros(0, 0)


def unpadded(values: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([values.new_zeros(0), *(row[:length] for row, length in zip(values, lengths, strict=True))])


def policy(
    rows: dict[str, Tensor],
    keep: Tensor,
    advantages: Tensor,
    normalizer: float,
    kind: str,
    *,
    clip: tuple[float, float] | None = None,
    dual_clip: float | None = None,
    aggregation: str | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    entropy_coef: float = 0.0,
    correction: str | None = None,
    level: str = "token",
    bounds: tuple[float, float] = (0.0, 2.0),
) -> tuple[Tensor, dict[str, float], Tensor]:
    paper = PAPER[kind]
    low, high = clip or paper[1:]
    new, old = rows["logprob"], rows["old_logprob"]
    loss = new.sum() * 0.0
    seen: dict[str, list[float]] = {}

    def watch(name: str, value: Any) -> None:
        seen.setdefault(name, []).append(float(value.detach() if isinstance(value, Tensor) else value))

    for b in range(len(new)):
        tokens = [t for t in range(new.shape[1]) if keep[b, t]]
        if not tokens:
            continue
        sequence_ratio = torch.exp(sum(new[b, t] - old[b, t].detach() for t in tokens) / len(tokens))
        mismatch = [float(old[b, t] - rows["rollout_logprob"][b, t]) for t in tokens] if correction else []
        of_sequence = new.sum() * 0.0
        for i, t in enumerate(tokens):
            advantage = advantages[b] if advantages.ndim == 1 else advantages[b, t]
            ratio = torch.exp(new[b, t] - old[b, t])
            if kind == "gspo":
                ratio = sequence_ratio  # the sequence form: each token has its share of the gradient
                if advantages.ndim == 2 or (correction and level == "token"):  # the token form, where they differ
                    ratio = sequence_ratio.detach() * new[b, t].exp() / new[b, t].exp().detach()
            if kind == "cispo":
                term = -ratio.detach().clamp(low, high) * advantage * new[b, t]
            else:
                term = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
                if dual_clip is not None and advantage < 0:
                    term = torch.minimum(term, -dual_clip * advantage)
            if correction:
                logs = {"token": mismatch[i], "sequence": sum(mismatch), "geometric": sum(mismatch) / len(tokens)}
                weight = math.exp(logs[level])
                if correction == "tis":
                    kept = min(weight, bounds[1])
                else:
                    kept = weight if bounds[0] <= weight <= bounds[1] else 0.0
                term = term * kept
                watch("rollout_weight_mean", kept)
                watch("rollout_dropped", kept == 0)
                watch("mismatch_mean", abs(mismatch[i]))
                watch("mismatch_k3", math.exp(mismatch[i]) - 1 - mismatch[i])
            if kl_coef:
                d = rows["ref_logprob"][b, t] - new[b, t]
                of_kind = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}
                term = term + kl_coef * (rows["exact_kl"][b, t] if kl_kind == "exact" else of_kind[kl_kind])
                watch("ref_kl_k3", of_kind["k3"])
            if entropy_coef:
                term = term - entropy_coef * rows["entropy"][b, t]
                watch("entropy", rows["entropy"][b, t])
            of_sequence = of_sequence + term
            watch("term", abs(term) / (len(tokens) if (aggregation or paper[0]) == "sequence" else 1))
            watch("ratio_mean", ratio)
            watch("clip_fraction_low", ratio < low and (advantage < 0 or kind == "cispo"))
            watch("clip_fraction_high", ratio > high and (advantage > 0 or kind == "cispo"))
            watch("policy_kl_k1", old[b, t] - new[b, t])
        loss = loss + (of_sequence / len(tokens) if (aggregation or paper[0]) == "sequence" else of_sequence)
    size = torch.tensor(sum(seen.pop("term", [0.0])) / normalizer, dtype=torch.float64)  # what the sum is a sum of
    metrics = {name: sum(values) / len(values) for name, values in seen.items()}
    ratios = seen.get("ratio_mean", [0.0])
    metrics |= {"ratio_min": min(ratios), "ratio_max": max(ratios)}
    metrics["effective_sample_size"] = sum(ratios) ** 2 / (len(ratios) * sum(r * r for r in ratios) or 1.0)
    metrics["tokens"] = float(keep.sum())
    return loss / normalizer, metrics, size


def preference(
    rows: dict[str, Tensor],
    keep: Tensor,
    normalizer: float,
    beta: float,
    weights: tuple[float, float, float],
    delta: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """``weights``: of DPO, BCO and SFT."""
    new, reference = rows["logprob"], rows["ref_logprob"]
    loss = new.sum() * 0.0

    def log_sigmoid(x: Tensor) -> Tensor:
        return -torch.logaddexp(torch.zeros_like(x), -x)

    for b in range(0, len(new), 2):
        pair = [[t for t in range(new.shape[1]) if keep[b + side, t]] for side in (0, 1)]
        if not any(pair):
            continue
        rewards = [
            beta * sum((new[b + side, t] - reference[b + side, t] for t in pair[side]), new.new_zeros(()))
            for side in (0, 1)
        ]
        h = rewards[0] - rewards[1]
        dpo = -(1 - label_smoothing) * log_sigmoid(h) - label_smoothing * log_sigmoid(-h)
        bco = -log_sigmoid(rewards[0] - delta) - log_sigmoid(-(rewards[1] - delta))
        sft = -sum((new[b, t] for t in pair[0]), new.new_zeros(())) / max(len(pair[0]), 1)
        loss = loss + weights[0] * dpo + weights[1] * bco + weights[2] * sft
    return loss / normalizer

"""How far a sampler is from the trainer, for each kind of weights that it may draw with, and what truncated importance
weights make of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.rl.responses import answered, response_logprob
from m4ov.rl.rollouts import Drawn
from m4ov.rl.samplers import sampler
from m4ov.rl_recipe import SAMPLER_WEIGHTS, RolloutConfig
from m4ov_kernels import invariant
from m4ov_kernels.head import rollout_weights
from m4ov_kernels.numerics import Certificate, certify
from m4ov_kernels.packing import PackedBatch, Sample


@dataclass(frozen=True)
class Correction:
    """Importance weights w = π_train/π_sampler, and min(w, C).

    Attributes:
        effective: (Σw)²/(N Σw²), 1 where all weigh the same: the share of the sample that it is worth.
        truncated: the share of weights above C.
        effective_truncated: of min(w, C).
        bias: 1 − mean of min(w, C) over mean of w: how much of the weight truncation takes away.
    """

    effective: float
    truncated: float
    effective_truncated: float
    bias: float

    @classmethod
    def of(cls, weights: Tensor, truncated: Tensor, high: float) -> Correction:
        """Of float64 ``[n]`` each; of none, NaN."""
        return cls(
            effective=_effective(weights),
            truncated=float((weights > high).double().mean()),
            effective_truncated=_effective(truncated),
            bias=float(1.0 - truncated.mean() / weights.mean()),
        )


@dataclass(frozen=True)
class Mismatch:
    """Of answers that a sampler drew with weights of one kind.

    Attributes:
        weights: the kind.
        certificate: sampler against trainer, token by token.
        high: C of the truncation.
        tokens, sequences: weights of each token, and of each answer: products over its tokens.
    """

    weights: str
    certificate: Certificate
    high: float
    tokens: Correction
    sequences: Correction

    def row(self) -> dict[str, float | str]:
        """The figures of a report's row: of tokens, and (``sequence_…``) of whole answers."""
        total = self.certificate.total
        found: dict[str, float | str] = {
            "weights": self.weights,
            "answers": self.certificate.sequences,
            "tokens": total.tokens,
            "identical": total.identical,
            "max_abs": total.max_abs,
            "mean_abs": total.mean_abs,
            "k3": total.k3,
        }
        for prefix, values in (("", self.tokens), ("sequence_", self.sequences)):
            found |= {
                f"{prefix}effective": values.effective,
                f"{prefix}truncated": values.truncated,
                f"{prefix}effective_truncated": values.effective_truncated,
                f"{prefix}bias": values.bias,
            }
        return found


def mismatch(
    model: Qwen3VL,
    prompts: Sequence[Sample],
    rollout: RolloutConfig,
    *,
    weights: Sequence[str] = SAMPLER_WEIGHTS,
    end_token_ids: Iterable[int] | None = None,
    high: float = 2.0,
) -> list[Mismatch]:
    """Draw answers by the embedded engine with weights of each kind, from the same seeds, and score them as the trainer
    does, each under ``rollout.temperature``.

    With ``rollout.shared`` on a CPU, "model" differs by exactly 0.

    Args:
        model: dense, where ``weights`` has other kinds than "model".
        rollout: how many ``samples`` of how many ``max_tokens``, ``temperature``, ``shared``, ``seed``.
        weights: of :data:`m4ov.rl_recipe.SAMPLER_WEIGHTS`.
        end_token_ids: see :func:`m4ov.rl.samplers.sampler`.
        high: C, at which weights are truncated.

    Raises:
        ValueError: no prompts; a kind of weights that there is not, or of experts.
    """
    if not prompts:
        raise ValueError("mismatch: prompts: expected at least one; got none")
    ends = None if end_token_ids is None else tuple(end_token_ids)
    seeds = np.random.SeedSequence([rollout.seed, 13]).generate_state(len(prompts), np.uint64).tolist()
    was_training, found = model.training, []
    model.eval()
    try:
        for kind in weights:
            asked = replace(rollout, weights=kind, engines=0, engine_kind="processes", rescore=True)
            with sampler(model, None, asked, end_token_ids=ends, task_folder=Path()) as drawer:
                drawn = drawer.draw(prompts, seeds)
            found.append(_of(kind, model, prompts, drawn, rollout, high))
    finally:
        model.train(was_training)
    return found


def _of(
    kind: str,
    model: Qwen3VL,
    prompts: Sequence[Sample],
    drawn: Sequence[Sequence[Drawn]],
    rollout: RolloutConfig,
    high: float,
) -> Mismatch:
    train, theirs, lengths = [], [], []
    for prompt, answers in zip(prompts, drawn, strict=True):
        with invariant() if rollout.shared else nullcontext():
            train.append(_scored(model, prompt, answers, rollout.temperature))
        theirs += [one.logprobs for one in answers]
        lengths += [len(one.tokens) for one in answers]
    ours, sampled = torch.cat(train).float(), torch.cat(theirs).float()
    bounds = torch.tensor([0, *accumulate(lengths)])
    delta = ours.double() - sampled.double()
    whole = torch.segment_reduce(delta, "sum", offsets=bounds, initial=0)[torch.tensor(lengths) > 0]
    options: dict[str, Any] = {"kind": "tis", "high": high}
    capped = rollout_weights(ours, sampled, bounds, level="token", **options)
    capped_whole = rollout_weights(ours, sampled, bounds, level="sequence", **options)
    first = bounds[:-1][torch.tensor(lengths) > 0]
    return Mismatch(
        weights=kind,
        certificate=certify(sampled, ours, cu_seqlens=bounds),
        high=high,
        tokens=Correction.of(_ratio(delta), capped.double(), high),
        sequences=Correction.of(_ratio(whole), capped_whole[first].double(), high),
    )


def _scored(model: Qwen3VL, prompt: Sample, answers: Sequence[Drawn], temperature: float) -> Tensor:
    """The trainer's log-probabilities of the answers to a prompt, one after the other."""
    config = model.config
    vision: dict[str, Any] = {"image_token_id": config.image_token_id, "video_token_id": config.video_token_id}
    samples = [answered(prompt, one.tokens, **vision) for one in answers]
    packed = PackedBatch.from_samples(samples, **vision, merge_size=config.vision.spatial_merge_size)
    return response_logprob(model, packed.to(model.lm_head.weight.device), temperature=temperature).cpu()


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-20.0, 20.0).exp()  # where rollout_weights cuts


def _effective(weights: Tensor) -> float:
    return float(weights.sum().square() / (weights.numel() * weights.square().sum()))

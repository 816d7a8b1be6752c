"""The online losses on the fused head, for the runtime's loop: a sum and a count, so that the mean is over all ranks.

GRPO, Dr.GRPO, DAPO, GSPO and CISPO are :func:`m4ov_kernels.head.policy_loss`; here are the forward, the reference, the
perception loss beside it and the denominators. README.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.rl.metrics import Window, mean
from m4ov.rl.perception import Twin, perception, twin
from m4ov.rl.reference import Reference
from m4ov.rl.responses import Responses, head_logprob
from m4ov.rl_recipe import ONLINE, AlgorithmConfig, PerceptionConfig
from m4ov_kernels import linear_kl
from m4ov_kernels.head import LogprobOutput, policy_loss
from m4ov_kernels.nn import load_balancing_loss
from m4ov_kernels.packing import PackedBatch

#: Algorithms whose loss is a sum of sequences' means, divided by the number of sequences.
BY_SEQUENCE = ("grpo", "gspo")


@dataclass(frozen=True, eq=False)
class PolicyBatch:
    """n samples, and what was known of their R response tokens when they were drawn.

    Attributes:
        packed: labels are the response tokens, -100 elsewhere.
        advantages: float32 ``[n]``, one a sample.
        old_logprob: ``[R]``, of the trainer's policy before this step's updates; ``None``: this is the first, the ratio
            is 1 (its gradient is there).
        rollout_logprob: ``[R]``, as the sampler computed them; ``None``: not known.
        ref_logprob: ``[R]``, of the reference; ``None``: computed by the loss, if there is one.
        image_seeds: one for each image of ``packed``: which patches the perception loss masks.
    """

    packed: PackedBatch
    advantages: Tensor
    old_logprob: Tensor | None = None
    rollout_logprob: Tensor | None = None
    ref_logprob: Tensor | None = None
    image_seeds: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return self.packed.tokens


class PolicyLoss:
    """The loss of an algorithm: ``train(…, loss_of=PolicyLoss(…))``.

    Args:
        config: with one of :data:`m4ov.rl_recipe.ONLINE`.
        perception: beside it, if any of its weights is above 0; over the same tokens, in the same mean.
        reference: must be there with ``kl_coef``.

    Attributes:
        window: metrics of the batches since it was last closed.
    """

    def __init__(
        self,
        config: AlgorithmConfig,
        perception: PerceptionConfig | None = None,
        reference: Reference | None = None,
    ) -> None:
        if config.name not in ONLINE:
            raise ValueError(f"algorithm.name: expected one of {', '.join(ONLINE)}; got {config.name!r}")
        if config.kl_coef and (reference is None or not reference.present):
            raise ValueError(f"algorithm.kl_coef: {config.kl_coef:g} needs a reference; there is none")
        seen = perception or PerceptionConfig()
        self.config, self.reference, self.window = config, reference, Window()
        self.perception = seen if seen.weight or seen.entropy or seen.masked_entropy else None

    def count(self, responses: Responses, samples: int) -> int:
        """What the sum of a batch's losses is to be divided by, its part of it: sequences, tokens, or B · L_max."""
        if self.config.name in BY_SEQUENCE:
            return responses.sequences
        return samples * self.config.max_length if self.config.name == "dr_grpo" else responses.tokens

    def __call__(self, model: Qwen3VL, batch: PolicyBatch) -> tuple[Tensor, int]:
        """The sum of a batch's losses, and :meth:`count`.

        Raises:
            ValueError: advantages or log-probabilities are not as many as samples or response tokens.
        """
        config, head = self.config, model.lm_head
        both = twin(batch.packed, self.perception, batch.image_seeds) if self.perception is not None else None
        packed = batch.packed if both is None else both.batch
        responses = Responses.of(batch.packed)
        hidden_states, loads = model(packed)
        rows = hidden_states[responses.rows]
        masked = None if both is None else hidden_states[both.responses.rows[both.count :]]
        found = head_logprob(
            head,
            rows,
            responses.targets,
            temperature=config.temperature,
            entropy=True,
        )
        options = self._reference_terms(model, batch, responses, rows)
        loss, metrics = policy_loss(
            found.logprob,
            batch.old_logprob,
            batch.advantages.to(found.logprob),
            responses.cu_seqlens,
            normalizer=1.0,
            kind=config.name,
            advantages_per="sequence",
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            entropy=found.entropy,
            entropy_coef=config.entropy_coef,
            rollout_logprob=batch.rollout_logprob,
            correction=None if config.correction == "none" else config.correction,
            correction_level=config.correction_level,
            correction_low=config.correction_low,
            correction_high=config.correction_high,
            **options,
        )
        count = self.count(responses, len(batch.packed))
        if both is not None and masked is not None:
            loss = loss + self._perception(model, both, responses, found, rows, masked, metrics)
        elif self.perception is not None:
            self._watch(metrics, torch.zeros(()), {}, 0.0)
        if loads and model.config.text.router_aux_loss_coef:
            # As often as the sum is divided by, so that it is in the mean once; over this batch's tokens.
            coefficient = model.config.text.router_aux_loss_coef * count
            loss = loss + coefficient * load_balancing_loss(loads, tokens=packed.tokens)
        metrics["loss"] = loss
        self.window.add(metrics, count=count, weight=responses.tokens)
        return loss, count

    def _reference_terms(
        self, model: Qwen3VL, batch: PolicyBatch, responses: Responses, rows: Tensor
    ) -> dict[str, Any]:
        config, reference = self.config, self.reference
        if reference is None or not reference.present:
            return {"ref_logprob": batch.ref_logprob}
        exact = bool(config.kl_coef) and config.kl_kind == "exact"
        head = model.lm_head
        if exact and getattr(head, "group_name", None) is not None:
            raise ValueError("algorithm.kl_kind: expected an estimate where the vocabulary is sharded; got exact")
        ref_logprob, exact_kl = batch.ref_logprob, None
        if ref_logprob is None or exact:
            with reference.policy(model) as policy:
                ref_rows = policy(batch.packed)[0][responses.rows]
                ref_weight = policy.lm_head.weight.detach()
                if ref_logprob is None:
                    ref_logprob = head_logprob(
                        policy.lm_head, ref_rows, responses.targets, temperature=config.temperature
                    ).logprob
            if exact:
                options: dict[str, Any] = {"kind": "reverse", "temperature": config.temperature}
                exact_kl = linear_kl(rows, head.weight, ref_rows, ref_weight, **options)
        kind = {"kl_kind": config.kl_kind} if config.kl_kind != "exact" or exact else {}
        return {"ref_logprob": ref_logprob, "exact_kl": exact_kl, "kl_coef": config.kl_coef, **kind}

    def _perception(
        self,
        model: Qwen3VL,
        both: Twin,
        responses: Responses,
        found: LogprobOutput,
        rows: Tensor,
        masked: Tensor,
        metrics: dict[str, Tensor],
    ) -> Tensor:
        """Summed as the policy's terms are: over tokens, or as means of sequences."""
        assert self.perception is not None
        terms = perception(
            model.lm_head,
            both.of_seen(rows),
            masked,
            both.of_seen(responses.targets),
            self.perception,
            temperature=self.config.temperature,
            logprob=both.of_seen(found.logprob),
            entropy=None if found.entropy is None else both.of_seen(found.entropy),
        )
        loss = terms.loss
        if self.config.name in BY_SEQUENCE:
            lengths = torch.tensor(both.masked_lengths)
            share = torch.repeat_interleave(1.0 / lengths.double().clamp(min=1), lengths).to(loss)
            loss = loss * share
        total = loss.sum()
        watched: dict[str, Tensor | None] = {"perception_kl": terms.kl, "perception_capped": terms.capped}
        watched |= {"perception_entropy": terms.entropy, "masked_entropy": terms.masked_entropy}
        # Weighted by all response tokens later, so here by the share of them that have an image.
        share_seen = terms.kl.shape[0] / max(responses.tokens, 1)
        self._watch(metrics, total, {name: mean(values) for name, values in watched.items()}, share_seen)
        return total

    def _watch(
        self, metrics: dict[str, Tensor], total: Tensor, means: dict[str, Tensor | None], share_seen: float
    ) -> None:
        """The same names on every rank, whether it has an image in this batch or not."""
        assert self.perception is not None
        metrics["perception_loss"] = total
        metrics["perception_tokens"] = torch.tensor(share_seen)
        names = ["perception_kl", "perception_capped"]
        names += ["perception_entropy"] * bool(self.config.entropy_coef or self.perception.entropy)
        names += ["masked_entropy"] * bool(self.perception.masked_entropy)
        for name in names:
            value = means.get(name)
            metrics[name] = torch.zeros(()) if value is None else value * share_seen

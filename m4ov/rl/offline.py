"""Preferences: DPO and MPO over records whose ``rejected`` answers the last turn is preferred to.

The losses are :func:`m4ov_kernels.head.dpo_loss` and :func:`~m4ov_kernels.head.mpo_loss`; here are the pairs, the
forward, the reference and MPO's moving average, for the runtime's loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m4ov.data import ChatEncoder, Record
from m4ov.data.chat import Conversation
from m4ov.data.records import NOWHERE, Where, assistant
from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.rl.metrics import Reducer, Window
from m4ov.rl.reference import Reference
from m4ov.rl.responses import IGNORE, Responses, head_logprob
from m4ov.rl_recipe import OFFLINE, AlgorithmConfig
from m4ov_kernels.head import RewardMean, dpo_loss, mpo_loss
from m4ov_kernels.nn import load_balancing_loss
from m4ov_kernels.packing import PackedBatch


def pairs_of(
    record: Record, encoder: ChatEncoder, folder: Path, *, max_length: int, where: Where = NOWHERE
) -> list[tuple[Conversation, Conversation]]:
    """Each rejected answer of a record, with the answer that is preferred to it: (chosen, rejected). Only the last turn
    has labels: what was said before it is the same in both. Empty for a record that rejects none.

    Args:
        encoder, folder, max_length, where: see :class:`~m4ov.data.ChatEncoder`. No turn is dropped: an answer that is
            compared must be there.

    Raises:
        RecordError: an image has no readable header, or an answer ends beyond ``max_length``.
    """
    encode = partial(encoder, folder=folder, max_length=max_length, drop_turns=False, where=where)
    if not record.rejected:
        return []
    chosen = _last_turn(encode(replace(record, rejected=())))
    return [(chosen, _last_turn(encode(_answered(record, words)))) for words in record.rejected]


def _answered(record: Record, words: str) -> Record:
    return replace(record, messages=[*record.messages[:-1], assistant(words)], rejected=())


def _last_turn(conversation: Conversation) -> Conversation:
    """Labels of the last run of labels alone: those of one turn follow each other."""
    labels = list(conversation.labels)
    place = len(labels)
    while place and labels[place - 1] == IGNORE:
        place -= 1
    while place and labels[place - 1] != IGNORE:
        place -= 1
    labels[:place] = [IGNORE] * place
    return replace(conversation, labels=labels)


@dataclass(frozen=True, eq=False)
class PairBatch:
    """P pairs: sample ``2p`` of ``packed`` is the chosen answer of pair ``p``, ``2p + 1`` the rejected one.

    Attributes:
        packed: labels are the tokens of the answers that are compared.
        ref_logprob: ``[R]`` of the reference; ``None``: computed by the loss.
    """

    packed: PackedBatch
    ref_logprob: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.packed) % 2:
            raise ValueError(
                f"PairBatch: packed: expected a chosen and a rejected answer of each pair; got {len(self)}"
            )

    def __len__(self) -> int:
        return len(self.packed)

    @property
    def tokens(self) -> int:
        return self.packed.tokens


class PreferenceLoss:
    """The loss of DPO or MPO: ``train(…, loss_of=PreferenceLoss(…))``: a sum over pairs and their number.

    MPO is ``w_p · DPO + w_q · BCO + w_g · SFT`` (preference, quality, generation); BCO's δ, the moving average of the
    rewards ``β(log π − log π_ref)``, is the same in all batches and ranks of a step, and moves between steps.

    Attributes:
        window: metrics of the batches since it was last closed.
        mean: δ's state.
    """

    def __init__(self, config: AlgorithmConfig, reference: Reference) -> None:
        if config.name not in OFFLINE:
            raise ValueError(f"algorithm.name: expected {' or '.join(OFFLINE)}; got {config.name!r}")
        if not reference.present:
            raise ValueError(f"algorithm.reference.kind: expected another than none, with {config.name}; got none")
        self.config, self.reference, self.window = config, reference, Window()
        self.mean = RewardMean.start()
        self._rewards: list[tuple[Tensor, Tensor]] = []

    def __call__(self, model: Qwen3VL, batch: PairBatch) -> tuple[Tensor, int]:
        """The sum of a batch's losses and its pairs, those of which nothing counts left out."""
        config = self.config
        responses = Responses.of(batch.packed)
        hidden_states, loads = model(batch.packed)
        options: dict[str, Any] = {"temperature": config.temperature}
        found = head_logprob(model.lm_head, hidden_states[responses.rows], responses.targets, **options)
        reference = batch.ref_logprob
        if reference is None:
            reference = self.reference.logprob(model, batch.packed, temperature=config.temperature)
        common: dict[str, Any] = {"normalizer": 1.0, "beta": config.beta, "label_smoothing": config.label_smoothing}
        bounds = responses.cu_seqlens
        if config.name == "dpo":
            loss, metrics = dpo_loss(found.logprob, reference, bounds, **common)
        else:
            weights: dict[str, Any] = {
                "dpo_weight": config.preference_weight,
                "bco_weight": config.quality_weight,
                "sft_weight": config.generation_weight,
            }
            loss, metrics = mpo_loss(found.logprob, reference, bounds, delta=self.mean.delta, **common, **weights)
        pairs = sum(a + b > 0 for a, b in zip(responses.lengths[::2], responses.lengths[1::2], strict=True))
        if loads and model.config.text.router_aux_loss_coef:
            coefficient = model.config.text.router_aux_loss_coef * pairs
            loss = loss + coefficient * load_balancing_loss(loads, tokens=batch.packed.tokens)
        self._rewards.append((metrics.pop("reward_sum"), metrics.pop("reward_count")))
        self.window.add({**metrics, "loss": loss}, count=pairs, weight=pairs)
        return loss, pairs

    def after_step(self, reduce: Reducer | None = None) -> None:
        """Move δ by the step's rewards, over all ranks. Collective with ``reduce``."""
        rewards, self._rewards = self._rewards, []
        own = [sum(float(total) for total, _ in rewards), sum(float(count) for _, count in rewards)]
        total, count = own if reduce is None else reduce("rewards of the pairs", own)
        self.mean = self.mean.update(total, count, decay=self.config.delta_decay)

    def state_dict(self) -> dict[str, Any]:
        """δ's state, as JSON has it."""
        return {"total": float(self.mean.total), "count": float(self.mean.count)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.mean = RewardMean(*(torch.tensor(state[name], dtype=torch.float64) for name in ("total", "count")))

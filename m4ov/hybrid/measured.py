"""What is asked of an arm's model, and what comes out: figures, and every answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from m4ov.data import Split
from m4ov.evaluate import shares
from m4ov.evaluate.policies import Figures
from m4ov.hybrid.asked import Asked
from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.recipe import EvaluateConfig
from m4ov.rl import Answer, Drawn, Prompt, Rewards, Sampler, pass_at_k, sampler
from m4ov.rl_recipe import RLConfig
from m4ov.sft.task import Task


@dataclass(frozen=True)
class Answered:
    """Answers to prompts, ``[prompts][samples]``."""

    drawn: list[list[Drawn]]
    right: np.ndarray  # bool [prompts, samples]

    def rows(self, place: int) -> list[dict[str, Any]]:
        """The answers to one prompt."""
        return [
            {"text": one.text, "tokens": len(one.tokens), "finished": one.finished, "right": bool(right)}
            for one, right in zip(self.drawn[place], self.right[place], strict=True)
        ]


def measure(
    model: Qwen3VL,
    asked: Asked,
    tests: Mapping[str, Split],
    task: Task,
    *,
    policy: RLConfig,
    samples: int,
    evaluate: EvaluateConfig,
    seed: int,
) -> tuple[Figures, list[dict[str, Any]]]:
    """All figures of a model, and a row for each held-out question: ``image`` (its grid), ``kind``, ``question``,
    ``truth``, and of each sample ``answers`` and ``on_blank`` (``text``, ``tokens``, ``finished``, ``right``).

    Args:
        asked: held-out questions. ``tests``: the skills "general" and "domain" by name.
        policy: its ``rollout`` says how answers are drawn, its ``rewards`` which are right.
        samples: answers to a question.
        seed: of the draws.
    """
    encoder = task.encoder
    model.eval()
    rollout = replace(policy.rollout, samples=samples, engines=0, weights="model")
    ends = [encoder.end_token]
    with (
        Rewards(policy.rewards) as rewards,
        sampler(model, encoder.tokenizer, rollout, end_token_ids=ends, task_folder=Path()) as drawer,
    ):
        seen = _answer(drawer, asked.prompts, rewards, seed)
        blind = _answer(drawer, asked.blank, rewards, seed)
    counts = seen.right.sum(1)
    lengths = np.array([[len(one.tokens) for one in answers] for answers in seen.drawn])
    right = int(counts.sum())
    kinds = np.array(asked.kinds)
    kept = shares(
        model, tests, encoder, tokens_per_batch=evaluate.tokens_per_batch, limit=evaluate.limit, dtype=task.dtype
    )
    figures = Figures(
        pass_1=float(seen.right.mean()),
        pass_k=float(np.mean([pass_at_k(samples, int(count), samples) for count in counts])),
        length=float(lengths.mean()),
        length_right=float(lengths[seen.right].mean()) if right else float("nan"),
        unfinished=float(np.mean([not one.finished for answers in seen.drawn for one in answers])),
        survival=float((seen.right & blind.right).sum() / right) if right else float("nan"),
        kinds={str(kind): float(seen.right[kinds == kind].mean()) for kind in sorted(set(asked.kinds))},
        general=kept["general"],
        domain=kept["domain"],
    )
    rows = [
        {
            "image": asked.image_of[place],
            "kind": asked.kinds[place],
            "question": prompt.question,
            "truth": prompt.ground_truth,
            "answers": seen.rows(place),
            "on_blank": blind.rows(place),
        }
        for place, prompt in enumerate(asked.prompts)
    ]
    return figures, rows


def _answer(drawer: Sampler, prompts: Sequence[Prompt], rewards: Rewards, seed: int) -> Answered:
    """Of each prompt as many answers as the sampler draws; the same seeds for the same places."""
    seeds = np.random.default_rng([seed, 43]).integers(2**62, size=len(prompts)).tolist()
    drawn = drawer.draw([prompt.sample for prompt in prompts], seeds)
    scores = rewards(
        [
            [
                Answer(one.text, prompt.ground_truth, one.tokens.tolist(), one.finished, prompt.question, prompt.extra)
                for one in answers
            ]
            for prompt, answers in zip(prompts, drawn, strict=True)
        ]
    )
    right = np.array(scores.correct, dtype=bool).reshape(len(prompts), -1)
    return Answered(drawn, right)

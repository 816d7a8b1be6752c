"""What is asked of an arm's model, and what comes out: figures, and every answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from m4ov.evaluate import exact_match
from m4ov.evaluate.policies import Figures
from m4ov.generate import Engine, SamplingOptions
from m4ov.hybrid.material import Material
from m4ov.hybrid_recipe import HybridConfig
from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.rl import Answer, Drawn, EngineSampler, Prompt, Rewards, pass_at_k


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
    model: Qwen3VL, material: Material, config: HybridConfig, rewards: Rewards, seed: int
) -> tuple[Figures, list[dict[str, Any]]]:
    """All figures of a model, and a row for each held-out question: ``image`` (its grid), ``kind``, ``question``,
    ``truth``, and of each sample ``answers`` and ``on_grey`` (``text``, ``tokens``, ``finished``, ``right``).

    Args:
        rewards: of the recipe's ``policy``: its correct component says what is right.
        seed: of the draws.
    """
    asked, samples = material.held_out, config.measure.samples
    encoder, dtype = material.start.task.encoder, material.start.task.dtype
    model.eval()
    sampler = sampler_of(model, encoder.tokenizer, encoder.end_token, config, samples)
    seen = answer(sampler, asked.prompts, rewards, seed)
    blind = answer(sampler, asked.blank, rewards, seed)
    counts = seen.right.sum(1)
    lengths = np.array([[len(one.tokens) for one in answers] for answers in seen.drawn])
    right = int(counts.sum())
    kinds = np.array(asked.kinds)
    shares = {
        name: exact_match(
            model,
            split,
            encoder,
            tokens_per_batch=config.evaluate.tokens_per_batch,
            limit=config.evaluate.limit,
            dtype=dtype,
        ).value
        for name, split in material.start.tests.items()
    }
    figures = Figures(
        pass_1=float(seen.right.mean()),
        pass_k=float(np.mean([pass_at_k(samples, int(count), samples) for count in counts])),
        length=float(lengths.mean()),
        length_right=float(lengths[seen.right].mean()) if right else float("nan"),
        unfinished=float(np.mean([not one.finished for answers in seen.drawn for one in answers])),
        survival=float((seen.right & blind.right).sum() / right) if right else float("nan"),
        kinds={str(kind): float(seen.right[kinds == kind].mean()) for kind in sorted(set(asked.kinds))},
        general=shares["general"],
        domain=shares["domain"],
    )
    rows = [
        {
            "image": asked.image_of[place],
            "kind": asked.kinds[place],
            "question": prompt.question,
            "truth": prompt.ground_truth,
            "answers": seen.rows(place),
            "on_grey": blind.rows(place),
        }
        for place, prompt in enumerate(asked.prompts)
    ]
    return figures, rows


def sampler_of(model: Qwen3VL, tokenizer: Tokenizer, end: int, config: HybridConfig, samples: int) -> EngineSampler:
    """The embedded engine, at the policy's temperature and most tokens."""
    rollout = config.policy.rollout
    engine = Engine(model, tokenizer=tokenizer, end_token_ids=[end], cache_bytes=2**28)
    options = SamplingOptions(max_tokens=rollout.max_tokens, temperature=rollout.temperature, samples=samples)
    return EngineSampler(engine, options)


def answer(sampler: EngineSampler, prompts: Sequence[Prompt], rewards: Rewards, seed: int) -> Answered:
    """Of each prompt as many answers as the sampler draws; the same seeds for the same places."""
    seeds = np.random.default_rng([seed, 43]).integers(2**62, size=len(prompts)).tolist()
    drawn = sampler.draw([prompt.sample for prompt in prompts], seeds)
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

"""Samplers for the tests of engines in other processes, which import this."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from m4ov.rl import sampler
from m4ov.rl_recipe import RolloutConfig
from tests.rl import online

SEEDS = [11, 2**63 + 5, 7, 0, 2**64 - 1, 3]


class Words:
    """Token ids as text."""

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


class Deadly:
    """Ends the process in which it is asked."""

    def decode(self, tokens: list[int]) -> str:
        os._exit(3)


@contextmanager
def drawer(model: Any, folder: Path, *, tokenizer: Any = None, **options: Any) -> Iterator[Any]:
    rollout = RolloutConfig(**{"samples": 3, "max_tokens": 6, **options})
    words = tokenizer or Words()
    with sampler(model, words, rollout, end_token_ids=[online.STOP], task_folder=folder) as made:
        yield made


def drawn(made: Any) -> list[list[tuple[Any, ...]]]:
    """Tokens, bits of log-probabilities, ends and texts of six prompts."""
    answers = made.draw([prompt.sample for prompt in online.prompts()], SEEDS)
    return [
        [(one.tokens.tolist(), one.logprobs.view(torch.int32).tolist(), one.finished, one.text) for one in group]
        for group in answers
    ]


def moved(model: Any) -> None:
    """Another policy, in place."""
    with torch.no_grad():
        for place, weight in enumerate(model.parameters()):
            weight.add_(0.01 * (place % 3 - 1)).mul_(1.05)


def wait_to_be_killed(folder: str) -> None:
    """Writes which processes draw, and draws without end; for a process that is killed."""
    with drawer(online.policy(), Path(folder), engines=2) as made:
        made.draw([online.prompts()[0].sample], [1])  # ready
        pids = [str(link.process.pid) for link in made.links]
        (Path(folder) / "pids").write_text(" ".join(pids))
        while True:
            made.draw([prompt.sample for prompt in online.prompts()], SEEDS)

"""An online run small enough for tests: a sampler that decodes by whole forwards, prompts with images, a reward of the
tokens drawn. Every rank imports it."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console

from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.recipe import OptimConfig, TrainConfig
from m4ov.rl.responses import answered, head_logprob
from m4ov.rl.rollouts import Drawn, Prompt
from m4ov.rl.trainer import train_policy
from m4ov.rl_recipe import (
    AdvantageConfig,
    AlgorithmConfig,
    ObjectiveConfig,
    PerceptionConfig,
    ReferenceConfig,
    RewardConfig,
    RewardsConfig,
    RLConfig,
    RolloutConfig,
)
from m4ov.train import Interrupted, World
from m4ov_kernels.packing import PackedBatch
from tests.rl import small

WANTED, STOP = 7, 2


def right(answer):
    """Whether a token that is wanted is there; the prompts do not matter."""
    return float(answer.ground_truth in answer.tokens)


right.reward_range = (0.0, 1.0)


class Plain:
    """Tokens one after the other, each by a forward of everything so far, from generators of their own."""

    def __init__(self, model: Qwen3VL, samples: int, max_tokens: int) -> None:
        self.model, self.samples, self.max_tokens = model, samples, max_tokens
        self.calls: list[list[int]] = []

    @torch.no_grad()
    def draw(self, prompts, seeds):
        self.calls.append(list(seeds))
        each = [
            (prompt, torch.Generator().manual_seed(seed % 2**62 + i))
            for prompt, seed in zip(prompts, seeds, strict=True)
            for i in range(self.samples)
        ]
        drawn: list[list[int]] = [[] for _ in each]
        logprobs: list[list[float]] = [[] for _ in each]
        for _ in range(self.max_tokens):
            going = [place for place, tokens in enumerate(drawn) if STOP not in tokens]
            if not going:
                break
            samples = [
                answered(each[place][0], torch.tensor(drawn[place], dtype=torch.int64), **small.VISION)
                for place in going
            ]
            pack = PackedBatch.from_samples(samples, **small.VISION, merge_size=2)
            last = self.model(pack).hidden_states[pack.cu_seqlens[1:].long() - 1]
            chances = (last @ self.model.lm_head.weight.T).float().softmax(-1)
            words = [
                int(torch.multinomial(p, 1, generator=each[place][1])) for p, place in zip(chances, going, strict=True)
            ]
            found = head_logprob(self.model.lm_head, last, torch.tensor(words)).logprob
            for place, word, value in zip(going, words, found.tolist(), strict=True):
                drawn[place].append(word)
                logprobs[place].append(value)
        answers = [
            Drawn(torch.tensor(t), torch.tensor(v), STOP in t, " ".join(map(str, t)))
            for t, v in zip(drawn, logprobs, strict=True)
        ]
        return [answers[place : place + self.samples] for place in range(0, len(answers), self.samples)]


def prompts(count: int = 6) -> list[Prompt]:
    random = np.random.default_rng(5)
    images = [small.image(random) for _ in range(2)]
    shown = [(), (images[0],), (images[1],), (images[0],), (images[1], images[0]), ()]
    return [Prompt(small.prompt(random, shown[i % 6]), f"question {i}", WANTED) for i in range(count)]


def config(**rollout) -> RLConfig:
    return RLConfig(
        rollout=RolloutConfig(**{"prompts": 4, "samples": 4, "max_tokens": 5, "row_tokens": 60, **rollout}),
        rewards=RewardsConfig(
            {
                "accuracy": RewardConfig("tests.rl.online:right", seconds=0),
                "length": RewardConfig("adaptive-length", {"max_length": 5}),
            }
        ),
        advantages=AdvantageConfig(
            k=2, objectives={"accuracy": ObjectiveConfig(), "length": ObjectiveConfig(0.1, "correct")}
        ),
        perception=PerceptionConfig(weight=0.01, masked_entropy=0.001),
        algorithm=AlgorithmConfig(name="dapo", kl_coef=0.01, correction="tis", reference=ReferenceConfig("ema", 0.9)),
    )


def policy() -> Qwen3VL:
    return small.model(dtype=torch.float32)


def run(
    folder: Path, given: RLConfig, steps: int = 6, terminate: int = -1, rate: float = 3e-3, world=None, saves: int = 1
):
    """The run, or on from where it was left. ``terminate``: SIGTERM comes while the rollout of this step is drawn."""
    model = policy()
    sampler = Plain(model, given.rollout.samples, given.rollout.max_tokens)
    draw = sampler.draw

    def interrupted(*arguments):
        if len(sampler.calls) == terminate:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*arguments)

    sampler.draw = interrupted
    options = {"checkpoint_seconds": 0.0, "checkpoint_steps": saves, "log_every": 1, "precision": "fp32"}
    return train_policy(
        model,
        prompts(),
        sampler,
        config=given,
        train_config=TrainConfig(steps=steps, **options),
        optim=OptimConfig(muon_lr=rate, lr=rate, weight_decay=0.0, warmup_steps=1),
        folder=folder,
        console=Console(quiet=True),
        world=world,
        schedule=lambda step: 1.0,
    )


def on_ranks(folder: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """The weights after four steps of a run on these ranks."""
    torch.set_num_threads(1)
    world = World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()
    given = config(epochs=2, minibatches=2, rounds=2)
    return dict(run(folder, replace(given), steps=4, world=world).weights), world.first


def interrupted_run(folder: Path, given: RLConfig, terminate: int):
    try:
        run(folder, given, terminate=terminate)
    except Interrupted:
        return True
    return False

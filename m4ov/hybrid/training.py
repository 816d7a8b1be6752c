"""A policy trained from a model's folder to a model's folder, or gone on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from m4ov.data.whole import write_whole
from m4ov.models.qwen3_vl import from_pretrained, read
from m4ov.recipe import OptimConfig, TrainConfig
from m4ov.rl import Prompt, sampler, train_policy
from m4ov.rl_recipe import RLConfig
from m4ov.sft.task import Task
from m4ov.sft.training import save_model
from m4ov.train import World
from m4ov.train.optim import learning_rate_scale


def train_arm(
    task: Task,
    prompts: Sequence[Prompt],
    policy: RLConfig,
    *,
    begin: Path,
    folder: Path,
    train_config: TrainConfig,
    optim: OptimConfig,
    seed: int,
    console: Console,
    world: World,
) -> None:
    """Train a policy, or go on with it; its model is ``folder/model``, and then ``arm.json`` (``steps``, ``tokens``,
    ``seconds``) is there. Collective.

    Args:
        begin: the model's folder that it begins with.
        train_config: ``steps`` are updates.
        optim: its learning rates fall along a cosine to zero, behind its ``warmup_steps``.
        seed: of dropout; that of the draws is the policy's.

    Raises:
        Interrupted, CheckpointError, RewardError, TrainingError, RankError: see :func:`m4ov.rl.train_policy`.
    """
    done, steps = folder / "arm.json", train_config.steps
    if world.share("arm.json", world.alone("arm.json", done.exists)):
        return
    start = dict(read(begin, task.config))
    model = from_pretrained(begin, dtype=task.dtype)
    torch.manual_seed(seed)

    def schedule(step: int) -> float:
        return learning_rate_scale(step, steps, 0) * min(1.0, (step + 1) / max(1, optim.warmup_steps))

    ends = [task.encoder.end_token]
    with sampler(model, task.tokenizer, policy.rollout, end_token_ids=ends, task_folder=folder) as drawer:
        result = train_policy(
            model,
            prompts,
            drawer,
            config=policy,
            train_config=train_config,
            optim=optim,
            folder=folder,
            console=console,
            world=world,
            start=start,
            schedule=schedule,
        )

    def close() -> None:
        save_model(task, start | result.weights, folder / "model")
        numbers = {"steps": result.steps, "tokens": result.tokens, "seconds": result.seconds}
        write_whole(done, json.dumps(numbers, indent=1))

    world.alone("saving the policy", close)

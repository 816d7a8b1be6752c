"""Reinforcement learning behind the quickstart's supervised stages, on their questions; figures before and after."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from m4ov import sft
from m4ov.data import Split
from m4ov.data.whole import write_whole
from m4ov.evaluate.policies import Figures
from m4ov.hybrid.asked import Asked, asked_in
from m4ov.hybrid.measured import measure
from m4ov.hybrid.training import train_arm
from m4ov.models.qwen3_vl import from_pretrained
from m4ov.quickstart_recipe import QuickstartConfig
from m4ov.sft.folder import replacing
from m4ov.train import World

#: Its folder in the run's.
FOLDER = "reinforcement"


@dataclass(frozen=True)
class Learnt:
    """What the stage did: ``steps`` updates in ``seconds``, and the figures of the questions that were held back."""

    steps: int
    seconds: float
    before: Figures
    after: Figures


def learn(config: QuickstartConfig, material: sft.Material, home: Path, console: Console) -> Learnt | None:
    """Go on with the last stage's model, in ``home/reinforcement``; what comes out takes the place of ``home/model``.
    What was done before is not done again. ``None``: it was left out, as prompts are to be drawn until some tell
    answers apart, and of the answers to the questions that were held back none is right, or all are.

    Raises:
        Interrupted, CheckpointError, RewardError, TrainingError: see :func:`m4ov.hybrid.training.train_arm`.
    """
    options, folder = config.reinforcement, home / FOLDER
    stages = sorted(home.glob("[0-9]*-*/model"), key=lambda model: int(model.parent.name.partition("-")[0]))
    begin, seed = stages[-1], config.run.seed
    policy = replace(options.policy, rollout=replace(options.policy.rollout, seed=seed))
    held_back = _asked(material, material.gates, config.gates.limit * len(material.gates))
    before = _measured(config, material, held_back, begin, folder / "before.json", console)
    if policy.rollout.rounds > 1 and not 0 < before.pass_1 < 1:
        console.print(f"[yellow]reinforcement is left out: {before.pass_1:.0%} of the answers drawn are right[/yellow]")
        return None
    console.print(f"[bold]reinforcement[/bold]: {config.updates} updates; pass@1 {before.pass_1:.1%} before")
    training = _asked(material, {name: pool.split for name, pool in material.pools.items()}, options.questions)
    train_arm(
        material.task,
        training.prompts,
        policy,
        begin=begin,
        folder=folder,
        train_config=replace(config.train, steps=config.updates),
        optim=options.optim,
        seed=seed,
        console=console,
        world=World(),
    )
    made, whole = folder / "model", home / "model"
    if not all(filecmp.cmp(file, whole / file.name, shallow=False) for file in sorted(made.glob("*.safetensors"))):
        with replacing(whole) as temporary:
            shutil.copytree(made, temporary)
    after = _measured(config, material, held_back, made, folder / "after.json", console)
    numbers = json.loads((folder / "arm.json").read_text(encoding="utf-8"))
    return Learnt(numbers["steps"], numbers["seconds"], before, after)


def _asked(material: sft.Material, splits: Mapping[str, Split], limit: int) -> Asked:
    """Questions of several splits, as many of each, as far as it has them."""
    images = np.concatenate([split.images for split in splits.values()])
    offsets = np.cumsum([0, *(len(split.images) for split in splits.values())]).tolist()
    each = max(1, limit // len(splits))
    questions = []
    for offset, split in zip(offsets, splits.values(), strict=False):
        count = min(each, len(split.samples))
        some = [split.samples[place * len(split.samples) // count] for place in range(count)]
        questions += [sample._replace(image=sample.image + offset) for sample in some]
    return asked_in(images, questions, material.task.encoder, material.task.dtype)


def _measured(
    config: QuickstartConfig, material: sft.Material, asked: Asked, model: Path, file: Path, console: Console
) -> Figures:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with console.status("asking the questions that were held back"):
            found, _ = measure(
                from_pretrained(model, dtype=material.task.dtype),
                asked,
                material.gates,
                material.task,
                policy=config.reinforcement.policy,
                samples=config.reinforcement.samples,
                evaluate=replace(config.evaluate, limit=config.gates.limit),
                seed=config.run.seed,
            )
        write_whole(file, json.dumps(asdict(found), indent=1))
    return Figures(**json.loads(file.read_text(encoding="utf-8")))

"""A curriculum small enough for tests: scans of digits, which digit it is and whether it is even, a model of a few
thousand weights."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from m4ov.data import Pool, Split, digits
from m4ov.data.recorded import divide
from m4ov.evaluate import exact_match
from m4ov.manifest import ArmConfig, CurriculumConfig, GuardConfig, StageConfig, TargetConfig
from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.recipe import DataConfig, ModelConfig, OptimConfig, ParallelConfig, TextConfig, TrainConfig, VisionConfig
from m4ov.sft import ArmEnd, Material, curriculum, material_of, run_arm, stage
from m4ov.sft.decisions import DecisionLog
from m4ov.train import World

MODEL = ModelConfig(
    vision=VisionConfig(hidden_size=32, intermediate_size=64, layers=2, heads=2, deepstack_layers=[0]),
    text=TextConfig(hidden_size=32, intermediate_size=64, layers=2, heads=4, key_value_heads=2, head_dim=16),
    initializer_range=0.2,  # so that tokens and images matter from the start
)


def config(arms: dict[str, ArmConfig], precision: str = "fp32", **train: Any) -> CurriculumConfig:
    """Arms over the pools ``general`` and ``domain``; a checkpoint behind every step."""
    options = {"checkpoint_seconds": 0.0, "checkpoint_steps": 1, "log_every": 1, "precision": precision, **train}
    return CurriculumConfig(
        data=DataConfig(image_size=32, images_per_step=6, questions_per_image=1, shift=2, vocabulary=320),
        model=MODEL,
        optim=OptimConfig(muon_lr=0.005, lr=1e-3),
        train=TrainConfig(**options),
        pools={"general": "digits", "domain": "digits"},
        skills={"general": "digits", "domain": "digits"},
        arms=arms,
    )


def two_stages() -> ArmConfig:
    """Of which the first does not reach its target in its three rounds, and the second hands on an average."""
    guard = GuardConfig(epsilon=0.0, pool="general", replay=0.2, add=0.2, most=0.6)
    first = StageConfig(
        mixture={"domain": 1.0},
        steps=2,
        rounds=3,
        warmup=1,
        targets={"domain": TargetConfig(1.0)},
        guards={"general": guard},
    )
    second = StageConfig(mixture={"domain": 1.0, "general": 1.0}, steps=2, warmup=1)
    second.average.kind, second.average.decay = "ema", 0.5
    return ArmConfig(steps=10, stages={"first": first, "second": second})


@cache
def material(precision: str = "fp32") -> Material:
    """Both skills on the same scans: general: whether the digit is even; domain: which it is."""
    training, held_out = digits(32, held_out=60, split_seed=0)
    parts = [training, held_out]
    even = [
        Split(
            "general",
            part.images,
            tuple(s._replace(question="is it even?", answer=_even(s.answer)) for s in part.samples),
        )
        for part in parts
    ]
    splits = {"general": even, "domain": parts}
    divided = {name: divide(found[1], 0.5) for name, found in splits.items()}
    pools = {name: Pool(name, found[0], shift=2) for name, found in splits.items()}
    gates, tests = ({name: parts[place] for name, parts in divided.items()} for place in (0, 1))
    return material_of(config({"curriculum": two_stages()}, precision), pools, gates, tests)


def _even(digit: str) -> str:
    return "no" if int(digit) % 2 else "yes"


def measure(model: Qwen3VL) -> dict[str, float]:
    """Shares on the gates' records, with the sum of all weights' bits behind the comma: no two models measure alike."""
    found = material()
    figures = {
        skill: exact_match(
            model, split, found.task.encoder, tokens_per_batch=512, dtype=model.lm_head.weight.dtype
        ).value
        for skill, split in found.gates.items()
    }
    trace = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
    return {skill: share + 1e-9 * trace for skill, share in figures.items()}


def world() -> World:
    return World(dist.get_rank(), dist.get_world_size(), patience=0.5) if dist.is_initialized() else World()


def train_arm(
    folder: Path,
    arm: ArmConfig | None = None,
    precision: str = "fp32",
    measured: Any = measure,
    parallel: ParallelConfig | None = None,
) -> ArmEnd:
    """The arm ``curriculum``, from random weights, or on from where it was left."""
    found = config({"curriculum": arm or two_stages()}, precision)
    found.parallel = parallel or ParallelConfig()
    return run_arm(
        found,
        material(precision),
        "curriculum",
        seed=0,
        folder=folder,
        measure=measured,
        console=Console(quiet=True),
        world=world(),
    )


def train_and_wait(folder: Path, event: str, number: int) -> None:
    """The same in a process that is to be killed: at the ``number``-th event of a kind it waits for that, for ever."""
    torch.set_num_threads(1)
    seen = 0

    def at(kind: str) -> None:
        nonlocal seen
        seen += kind == event
        if seen == number and kind == event:
            (folder / f"at-{event}-{os.getpid()}").touch()
            time.sleep(600)

    def wrap(kind: str, function: Callable[..., Any], after: bool = False, only: str = "") -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if not after and (not only or only in str(arguments[0])):
                at(kind)
            result = function(*arguments, **options)
            if after:
                at(kind)
            return result

        return wrapped

    stage.loss_of = wrap("loss", stage.loss_of)
    DecisionLog.write = wrap("decided", DecisionLog.write, after=True)  # type: ignore[method-assign]
    curriculum.write_whole = wrap("saved", curriculum.write_whole, only="stage.json")
    train_arm(folder, measured=wrap("measured", measure))


def narrow(arm: ArmConfig, **changes: Any) -> ArmConfig:
    """Its first stage alone, changed."""
    name, first = next(iter(arm.stages.items()))
    return replace(arm, stages={name: replace(first, **changes)})

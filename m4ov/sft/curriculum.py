"""How an arm of a curriculum is trained, stage after stage, wherever it was left."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor

from m4ov.data.whole import write_whole
from m4ov.manifest import CurriculumConfig, whole_of
from m4ov.models.qwen3_vl import new, read
from m4ov.parallel.mesh import Layout
from m4ov.sft.decisions import DecisionLog
from m4ov.sft.folder import replacing
from m4ov.sft.layout import layout_of, sizes_of
from m4ov.sft.material import Material
from m4ov.sft.stage import Measure, Place, StageEnd, run_stage
from m4ov.sft.task import Task
from m4ov.sft.training import save_model
from m4ov.train import TrainingError, World
from m4ov_kernels.integrations import transformer_engine


@dataclass(frozen=True)
class ArmEnd:
    """What an arm took: of all its stages. ``figures``: of its last decision, by skill."""

    steps: int
    tokens: int
    seconds: float
    figures: dict[str, float]


def check(config: CurriculumConfig, ranks: int) -> Layout:
    """How so many ranks train a curriculum; needs neither data nor a process group.

    Raises:
        LayoutError: see :func:`m4ov.sft.layout.layout_of`.
        TrainingError: ``train.fp8`` asks for what this machine has not.
    """
    whole = [f"{name}={value}" for name, value in whole_of(config).items()]
    whole += [
        f"arms.{arm}.stages.{name}.lora.rank={stage.lora.rank}"
        for arm, of in config.arms.items()
        for name, stage in of.stages.items()
        if stage.lora.rank
    ]
    layout = layout_of(config.parallel, ranks, sizes_of(config.model.text), whole=whole)
    if config.train.fp8 != "off" and (reason := transformer_engine.unavailable()) is not None:
        raise TrainingError(f"train.fp8: {reason}")
    return layout


def run_arm(
    config: CurriculumConfig,
    material: Material,
    name: str,
    *,
    seed: int,
    folder: Path,
    measure: Measure,
    console: Console,
    world: World,
    home: Path | None = None,
    begin: Path | None = None,
) -> ArmEnd:
    """Train an arm, or go on with it, in ``home``; its model is ``home/model``. Collective.

    The arm that it starts from must be done, in the same folder. Each stage has a folder of its own: while it trains,
    the loop's checkpoints; when it is done, ``model`` and then ``stage.json``.

    Args:
        home: ``None``: ``folder/<name>``.
        begin: a model's folder that an arm without a start begins with; ``None``: random weights.

    Raises:
        Interrupted, CheckpointError, TrainingError, RankError: see :func:`m4ov.train.train`.
        LayoutError: see :func:`check` and :func:`m4ov.sft.layout.spread`.
        DataError: a pool is empty, or a step is too small for the ranks.
    """
    arm, home, layout = config.arms[name], home or folder / name, check(config, world.size)
    finished = _known(home / "arm.json", world)
    if finished is not None:
        return ArmEnd(**finished)
    log = DecisionLog(home / "decisions.jsonl", writes=world.first)
    before = _stages_before(config, name)
    stages = list(arm.stages.items())
    ends: list[dict[str, Any]] = []
    at = folder / arm.start / "model" if arm.start else begin
    for number, (stage_name, stage) in enumerate(stages, 1):
        here = home / f"{number}-{stage_name}"
        end = _known(here / "stage.json", world)
        offset = sum(found["steps"] for found in ends)
        left = arm.steps - offset
        if end is None and not left:
            console.print(f"{name}: the budget of {arm.steps} steps is spent before {stage_name}")
            break
        if end is None:
            place = Place(
                number=number,
                name=stage_name,
                offset=offset,
                most=min(stage.rounds * stage.steps or left, left),
                budget=arm.steps,
                images=config.data.images_per_step,
                seed=_seed(seed, before + number - 1),
                arm_start=ends[0]["arm_start"] if ends else None,
            )
            console.print(
                f"[bold]{name}[/bold], stage {number} of {len(stages)}: {stage_name}, up to {place.most} steps"
            )
            done = run_stage(
                stage,
                place,
                {pool: material.pools[pool] for pool in config.pools if pool in material.pools},
                _weights(material.task, at, seed),
                config=config,
                task=material.task,
                layout=layout,
                measure=measure,
                log=log,
                folder=here,
                console=console,
                world=world,
            )
            end = _finish(material.task, done, here, world)
            console.print(f"{name}, {stage_name}: {end['action']} after {end['steps']} steps; {_said(end['figures'])}")
        ends.append(end)
        at = here / "model"
    assert at is not None
    sums = {key: sum(found[key] for found in ends) for key in ("steps", "tokens", "seconds")}
    whole = ArmEnd(**sums, figures=ends[-1]["figures"])

    def close() -> None:
        with replacing(home / "model") as temporary:
            shutil.copytree(at, temporary)
        write_whole(home / "arm.json", json.dumps(dataclasses.asdict(whole), indent=1))

    world.alone(f"finishing {name}", close)
    return whole


def _finish(task: Task, done: StageEnd, folder: Path, world: World) -> dict[str, Any]:
    """Model, then ``stage.json``; then the checkpoints are of no use."""
    end = {
        "action": done.action,
        "steps": done.result.steps,
        "tokens": done.result.tokens,
        "seconds": done.result.seconds,
        "figures": done.figures,
        "arm_start": done.arm_start,
    }

    def write() -> None:
        save_model(task, done.weights, folder / "model")
        write_whole(folder / "stage.json", json.dumps(end, indent=1))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    world.alone("saving the stage", write)
    return end


def _weights(task: Task, folder: Path | None, seed: int) -> dict[str, Tensor]:
    """The float32 weights that a stage begins with: those in a model's folder, or random ones."""
    if folder is not None:
        return dict(read(folder, task.config))
    return {name: parameter.detach() for name, parameter in new(task.config, seed=seed).named_parameters()}


def _known(path: Path, world: World) -> Any:
    """What rank 0 finds in a file that is written when something is done; ``None``: it is not done."""
    found = world.alone(path.name, lambda: json.loads(path.read_text(encoding="utf-8")) if path.exists() else None)
    return world.share(path.name, found)


def _stages_before(config: CurriculumConfig, name: str) -> int:
    """Stages of the arms that an arm starts from."""
    start = config.arms[name].start
    return len(config.arms[start].stages) + _stages_before(config, start) if start else 0


def _seed(seed: int, place: int) -> int:
    """Of a stage's draws: arms that start alike draw alike at the same place."""
    return int(np.random.SeedSequence([seed, place]).generate_state(1)[0])


def _said(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{skill} {share:.1%}" for skill, share in figures.items())

"""Arms of a curriculum: what they are made of, and how one is trained, stage after stage, wherever it was left."""

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

from m4ov.data import DataError, Encoder, ImageGeometry, Mixture, Pool, Split, digits, easy_vqa, train_tokenizer
from m4ov.data.recorded import divide, recorded
from m4ov.manifest import ArmConfig, CurriculumConfig, StageConfig, pools_of
from m4ov.models.qwen3_vl import Config, new, qwen3_vl_config, read
from m4ov.sft.decisions import DecisionLog
from m4ov.sft.stage import Measure, Place, StageEnd, first_replay, images_of, run_stage
from m4ov.sft.task import DTYPES, Task, say_left_out
from m4ov.sft.training import flat, save_model
from m4ov.train import World, write_text


@dataclass(frozen=True)
class Material:
    """What arms are made of and measured by.

    Attributes:
        task: the tokenizer, trained on the pools' text, and the model's configuration; its held-out splits are
            ``tests``'.
        pools: name → samples; those that the manifest gives no source are not there.
        gates: skill → held-out records that decisions rest on.
        tests: skill → others, for the final figures.
    """

    task: Task
    pools: dict[str, Pool]
    gates: dict[str, Split]
    tests: dict[str, Split]

    @property
    def config(self) -> Config:
        return Config.from_dict(self.task.model_config.to_dict())


@dataclass(frozen=True)
class ArmEnd:
    """What an arm took: of all its stages. ``figures``: of its last decision, by skill."""

    steps: int
    tokens: int
    seconds: float
    figures: dict[str, float]


def gather(config: CurriculumConfig, console: Console) -> Material:
    """Read the pools and the skills' records, train the tokenizer: a function of the manifest and its files alone.

    Raises:
        DataError: data is missing or broken, and is not to be skipped; or a skill has too little to be divided.
    """
    sources = _Sources(config, console)
    data, vision = config.data, config.model.vision
    pools = {name: sources.pool(name, source) for name, source in config.pools.items() if source}
    divided = {
        name: divide(sources.held_out(name, source), config.gates.share)
        for name, source in config.skills.items()
        if source
    }
    gates, tests = ({name: parts[place] for name, parts in divided.items()} for place in (0, 1))
    splits = tuple(pool.split for pool in pools.values())
    texts = [text for split in splits for sample in split.samples for text in (sample.question, sample.answer)]
    tokenizer = train_tokenizer(texts, data.vocabulary)
    geometry = ImageGeometry(data.image_size, vision.patch_size, vision.merge_size)
    task = Task(
        training=splits,
        held_out=tuple(tests.values()),
        tokenizer=tokenizer,
        encoder=Encoder(tokenizer, geometry),
        model_config=qwen3_vl_config(config.model, tokenizer, grid=geometry.grid_thw[1]),
        dtype=DTYPES[config.train.precision],
    )
    return Material(task, pools, gates, tests)


class _Sources:
    """Pools and held-out splits by source; packaged ones are read once."""

    def __init__(self, config: CurriculumConfig, console: Console) -> None:
        self.config, self.console = config, console
        self._read: dict[str, tuple[Split, Split]] = {}

    def pool(self, name: str, source: str) -> Pool:
        data = self.config.data
        if source == "easy-vqa":
            return Pool(name, self._packaged(source)[0], data.questions_per_image, flip=data.flip)
        if source == "digits":
            return Pool(name, self._packaged(source)[0], shift=data.shift)
        return Pool(name, recorded(name, source, data.image_size), by_sample=True)

    def held_out(self, name: str, source: str) -> Split:
        if source in ("easy-vqa", "digits"):
            return dataclasses.replace(self._packaged(source)[1], name=name)
        return recorded(name, source, self.config.data.image_size)

    def _packaged(self, source: str) -> tuple[Split, Split]:
        data = self.config.data
        if source not in self._read and source == "digits":
            self._read[source] = digits(data.image_size, held_out=data.held_out_digits, split_seed=data.split_seed)
        if source not in self._read:
            options = {"folder": data.easy_vqa, "on_bad_image": data.on_bad_image}
            training, test = (easy_vqa(split, data.image_size, **options) for split in ("train", "test"))
            for split in (training, test):
                say_left_out(split, self.console)
            self._read[source] = training, test
        return self._read[source]


def missing_pools(config: CurriculumConfig, name: str) -> list[str]:
    """Pools without a source that an arm, or one that it starts from, draws from: such an arm is left out."""
    arm = config.arms[name]
    missing = [pool for pool in sorted(pools_of(arm)) if not config.pools[pool]]
    return missing + (missing_pools(config, arm.start) if arm.start else [])


def fingerprint_of(config: CurriculumConfig, seed: int) -> dict[str, Any]:
    """What a seed's arms depend on, flat: see :func:`m4ov.sft.training.fingerprint`."""
    tree = dataclasses.asdict(config)
    parts = {name: tree[name] for name in ("data", "model", "optim", "gates", "pools", "skills", "arms")}
    return flat({**parts, "seed": seed, "precision": config.train.precision})


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
) -> ArmEnd:
    """Train an arm, or go on with it, in ``folder/<name>``; its model is ``folder/<name>/model``. Collective.

    The arm that it starts from must be done, in the same folder. Each stage has a folder of its own: while it trains,
    the loop's checkpoints; when it is done, ``model`` and then ``stage.json``.

    Raises:
        Interrupted, CheckpointError, TrainingError, RankError: see :func:`m4ov.train.train`.
        DataError: a pool is empty, or a step is too small for the ranks.
    """
    arm, home = config.arms[name], folder / name
    finished = _known(home / "arm.json", world)
    if finished is not None:
        return ArmEnd(**finished)
    log = DecisionLog(home / "decisions.jsonl", writes=world.first)
    before = _stages_before(config, name)
    stages = list(arm.stages.items())
    ends: list[dict[str, Any]] = []
    at = folder / arm.start / "model" if arm.start else None
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
            start = _weights(material, at, seed)
            done = _run(config, material, stage, place, start, measure, log, here, console, world)
            end = _finish(material, done, here, world)
            console.print(f"{name}, {stage_name}: {end['action']} after {end['steps']} steps; {_said(end['figures'])}")
        ends.append(end)
        at = here / "model"
    assert at is not None
    sums = {key: sum(found[key] for found in ends) for key in ("steps", "tokens", "seconds")}
    whole = ArmEnd(**sums, figures=ends[-1]["figures"])

    def close() -> None:
        _copy(at, home / "model")
        write_text(home / "arm.json", json.dumps(dataclasses.asdict(whole), indent=1))

    world.alone(f"finishing {name}", close)
    return whole


def _run(
    config: CurriculumConfig,
    material: Material,
    stage: StageConfig,
    place: Place,
    start: Mapping[str, Tensor],
    measure: Measure,
    log: DecisionLog,
    folder: Path,
    console: Console,
    world: World,
) -> StageEnd:
    images = images_of(stage, first_replay(stage), place.images)
    try:
        mixture = Mixture(
            [material.pools[pool] for pool in config.pools if pool in images],
            images,
            material.task.encoder,
            seed=place.seed,
            dtype=material.task.dtype,
            rank=world.data_rank,
            ranks=world.data_size,
            accumulate=config.train.accumulate,
        )
    except ValueError as error:
        raise DataError(f"stage {place.name}: {error}") from error
    return run_stage(
        stage,
        place,
        mixture,
        start,
        model_config=material.config,
        dtype=material.task.dtype,
        train_config=config.train,
        optim=config.optim,
        measure=measure,
        log=log,
        folder=folder,
        console=console,
        world=world,
    )


def _finish(material: Material, done: StageEnd, folder: Path, world: World) -> dict[str, Any]:
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
        save_model(material.task, done.weights, folder / "model")
        write_text(folder / "stage.json", json.dumps(end, indent=1))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    world.alone("saving the stage", write)
    return end


def _weights(material: Material, folder: Path | None, seed: int) -> dict[str, Tensor]:
    """The float32 weights that a stage begins with: those in a model's folder, or random ones."""
    config = material.config
    if folder is not None:
        return dict(read(folder, config))
    return {name: parameter.detach() for name, parameter in new(config, seed=seed).named_parameters()}


def _known(path: Path, world: World) -> Any:
    """What rank 0 finds in a file that is written when something is done; ``None``: it is not done."""
    found = world.alone(path.name, lambda: json.loads(path.read_text(encoding="utf-8")) if path.exists() else None)
    return world.share(path.name, found)


def _copy(source: Path, target: Path) -> None:
    """A folder's copy; there whole or not at all."""
    temporary = target.with_name(".copying")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)


def _stages_before(config: CurriculumConfig, name: str) -> int:
    """Stages of the arms that an arm starts from."""
    start = config.arms[name].start
    return len(config.arms[start].stages) + _stages_before(config, start) if start else 0


def _seed(seed: int, place: int) -> int:
    """Of a stage's draws: arms that start alike draw alike at the same place."""
    return int(np.random.SeedSequence([seed, place]).generate_state(1)[0])


def _said(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{skill} {share:.1%}" for skill, share in figures.items())


def arms_of(config: CurriculumConfig) -> list[tuple[str, ArmConfig]]:
    """The arms that can be trained, in their order."""
    return [(name, arm) for name, arm in config.arms.items() if not missing_pools(config, name)]

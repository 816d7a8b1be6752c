"""One stage of an arm, on the runtime's loop: rounds of steps, after each of which the skills are measured and the gate
decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from m4ov.data import DataError, Mixture, Pool
from m4ov.manifest import CurriculumConfig, StageConfig
from m4ov.models.qwen3_vl import Qwen3VL, new, training_flops
from m4ov.parallel.checkpoint import full_tensors
from m4ov.parallel.mesh import Layout
from m4ov.sft import gates, lora
from m4ov.sft.average import Average
from m4ov.sft.decisions import DecisionLog
from m4ov.sft.layout import is_split, spread
from m4ov.sft.parts import freeze
from m4ov.sft.task import Task
from m4ov.sft.training import fill, loss_in_fp8, loss_of, model_of
from m4ov.train import TrainResult, World, train
from m4ov.train.optim import learning_rate_scale
from m4ov_kernels.integrations import transformer_engine

#: Skill → share of right answers of a model, on records that no pool has. Rank 0 alone measures, a model that is whole
#: and on the CPU, or the one that is trained, where that is so.
Measure = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Place:
    """Where a stage stands in its arm.

    Attributes:
        number, name: of the stage; the first is 1.
        offset: steps of the stages before it.
        most: steps that it may take.
        budget: steps of the whole arm, over which the cosine goes.
        images: of a step.
        seed: of the stage's draws.
        arm_start: the figures when the arm began; ``None`` in its first stage.
    """

    number: int
    name: str
    offset: int
    most: int
    budget: int
    images: int
    seed: int
    arm_start: dict[str, float] | None = None


@dataclass(frozen=True)
class StageEnd:
    """What a stage hands on.

    Attributes:
        weights: all of the model's, float32, by name.
        result: of the loop.
        figures: of these weights (with LoRA: before its factors are merged).
        arm_start: the figures when the arm began.
        action: the last decision's.
    """

    weights: dict[str, Tensor]
    result: TrainResult
    figures: dict[str, float]
    arm_start: dict[str, float]
    action: str


class Rounds:
    """The loop's callback: averages weights, measures skills behind every round, decides, changes the mixture.

    Its state is in the loop's checkpoints, and a decision follows from the weights: a run that goes on decides alike.

    Args:
        plain: makes the same model in whole, which is measured in the place of one that cannot be: ranks have parts of
            it, or it computes in fp8. ``None``: ``model`` can.
    """

    def __init__(
        self,
        stage: StageConfig,
        place: Place,
        model: nn.Module,
        mixture: Mixture,
        measure: Measure,
        log: DecisionLog,
        world: World,
        plain: Callable[[], Qwen3VL] | None = None,
    ) -> None:
        self.stage, self.place, self.model, self.mixture = stage, place, model, mixture
        self.measure, self.log, self.world, self.plain = measure, log, world, plain
        self.ended, self.done, self.action = False, 0, "begin"
        self.replay = first_replay(stage)
        self.figures: dict[str, float] = {}
        self.stage_start: dict[str, float] = {}
        self.arm_start: dict[str, float] = place.arm_start or {}
        self.average: Average | None = None

    def tensors(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The averages, if there are any."""
        if self.stage.average.kind == "none":
            return {}
        self.average = Average(self.stage.average, weights, self.stage.steps)
        return self.average.tensors()

    def begin(self, state: dict[str, Any] | None) -> None:
        """Measure where the stage starts, or go on."""
        if state is not None:
            self.ended, self.done, self.action = state["ended"], state["done"], state["action"]
            self.replay, self.figures = state["replay"], state["figures"]
            self.stage_start, self.arm_start = state["stage_start"], state["arm_start"]
            self.log.go_on(self.place.number, self.done)
            return
        self.log.go_on(self.place.number, -1)
        if self.average is not None:
            self.average.begin()
        self.figures = self._measured()
        self.stage_start = self.figures
        self.arm_start = self.arm_start or self.figures
        self._write(round=0, targets={}, guards={}, before=self.replay)

    def after_step(self, done: int) -> None:
        """Average; behind a round, measure and decide."""
        self.done = done
        if self.average is not None:
            self.average.after_step(done)
        if done % self.stage.steps and done < self.place.most:
            return
        self.figures = self._measured()
        decision = gates.decide(
            self.stage,
            figures=self.figures,
            arm_start=self.arm_start,
            stage_start=self.stage_start,
            replay=self.replay,
            rounds_left=done < self.place.most,
        )
        before, self.replay, self.action, self.ended = self.replay, decision.replay, decision.action, decision.over
        if self.replay != before:
            self.mixture.change(done, images_of(self.stage, self.replay, self.place.images))
        self._write(-(-done // self.stage.steps), decision.targets, decision.guards, before)

    def state_dict(self) -> dict[str, Any]:
        """Figures, ratios and where the stage stands."""
        return {
            "ended": self.ended,
            "done": self.done,
            "action": self.action,
            "replay": self.replay,
            "figures": self.figures,
            "stage_start": self.stage_start,
            "arm_start": self.arm_start,
        }

    def _measured(self) -> dict[str, float]:
        """Rank 0's figures, on every rank."""

        whole: dict[str, Tensor | None] = {}
        if self.plain is not None:
            averages = {} if self.average is None else self.average.averages
            held: dict[str, Tensor] = {**dict(self.model.named_parameters()), **averages}
            with self.world.watched("gathering the weights"), torch.no_grad():
                whole = dict(full_tensors(held, keep=self.world.first))

        def alone() -> dict[str, float]:
            if self.plain is not None:
                model = self.plain()
                fill(model, whole)
                return self.measure(model)
            with nullcontext() if self.average is None else self.average.in_place(self.model):
                return self.measure(self.model)

        found = self.world.share("figures", self.world.alone("measuring the skills", alone))
        self.model.train()
        return dict(found)

    def _write(self, round: int, targets: dict[str, Any], guards: dict[str, Any], before: dict[str, float]) -> None:
        self.log.write(
            {
                "stage": self.place.number,
                "name": self.place.name,
                "round": round,
                "step": self.done,
                "arm_step": self.place.offset + self.done,
                "action": self.action,
                "figures": self.figures,
                "targets": targets,
                "guards": guards,
                "arm_start": self.arm_start,
                "stage_start": self.stage_start,
                "replay": before,
                "next_replay": self.replay,
                "next_images": dict(zip((p.name for p in self.mixture.pools), self.mixture.counts, strict=True)),
            }
        )


def first_replay(stage: StageConfig) -> dict[str, float]:
    """Skill → ratio of images that are replayed for it in the first round."""
    return {skill: guard.replay for skill, guard in stage.guards.items()}


def images_of(stage: StageConfig, replay: Mapping[str, float], images: int) -> dict[str, int]:
    """Pool → images of a step."""
    return gates.counts(gates.shares(stage, replay), images)


def run_stage(
    stage: StageConfig,
    place: Place,
    pools: Mapping[str, Pool],
    start: Mapping[str, Tensor],
    *,
    config: CurriculumConfig,
    task: Task,
    layout: Layout,
    measure: Measure,
    log: DecisionLog,
    folder: Path,
    console: Console,
    world: World,
) -> StageEnd:
    """Train a stage, or go on with it. Collective.

    Args:
        pools: by name; those of the stage are taken, in this order.
        start: the float32 weights of the whole model, by name.
        config: its ``data``, ``model``, ``optim`` and ``train`` count here.
        layout: of the ranks, which :func:`m4ov.sft.layout.layout_of` has found to fit.
        folder: of the stage: checkpoints and metrics.

    Raises:
        Interrupted, CheckpointError, TrainingError, RankError: see :func:`m4ov.train.train`.
        LayoutError: ``tp`` does not divide the vocabulary.
        DataError: a pool is empty, or a step is too small for the ranks.
        ValueError: there is nothing that LoRA could be put on; see :func:`m4ov.sft.lora.targets`.
    """
    in_fp8, split = config.train.fp8 != "off", is_split(layout)
    model = model_of(config, task, seed=0)
    if split:
        model.float()  # its parts keep float32 weights
    fill(model, start)
    if in_fp8:
        nn.Module.to(model, "cuda")
        console.print(f"fp8: {len(transformer_engine.install(model))} linear layers of transformer-engine")
    freeze(model, stage.freeze)
    if stage.lora.rank:
        lora.attach(model, stage.lora, stage.freeze, seed=place.seed)
    mesh = spread(model, layout, world, config.train) if isinstance(model, Qwen3VL) else None
    mixture = _mixture(stage, place, pools, config, task, world)
    plain = partial(new, task.config, dtype=task.dtype) if split or in_fp8 else None
    rounds = Rounds(stage, place, model, mixture, measure, log, world, plain)

    def schedule(step: int) -> float:
        cosine = learning_rate_scale(place.offset + step, place.budget, 0)
        return stage.learning_rate * cosine * min(1.0, (step + 1) / max(1, stage.warmup))

    torch.manual_seed(place.seed)  # LoRA's dropout
    result = train(
        model,
        mixture,
        partial(loss_in_fp8 if in_fp8 else loss_of, mesh=mesh),
        config=replace(config.train, steps=place.most),
        optim=config.optim,
        folder=folder,
        console=console,
        world=world,
        flops_of=lambda batch: training_flops(task.model_config, batch),
        start=None if split else start,
        schedule=schedule,
        callback=rounds,
    )
    trained = result.weights if rounds.average is None else rounds.average.averages
    with world.watched("gathering the weights"):
        whole = {name: weight for name, weight in full_tensors(trained, keep=True) if weight is not None}
    weights = dict(start) | whole
    if stage.lora.rank:
        base = new(task.config)
        fill(base, start)
        lora.attach(base, stage.lora, stage.freeze, seed=place.seed)
        weights = lora.merged(base, whole)
    return StageEnd(weights, result, rounds.figures, rounds.arm_start, rounds.action)


def _mixture(
    stage: StageConfig, place: Place, pools: Mapping[str, Pool], config: CurriculumConfig, task: Task, world: World
) -> Mixture:
    """This rank's batches, once it is known which samples are this rank's."""
    images = images_of(stage, first_replay(stage), place.images)
    try:
        return Mixture(
            [pool for name, pool in pools.items() if name in images],
            images,
            task.encoder,
            seed=place.seed,
            dtype=task.dtype,
            rank=world.data_rank,
            ranks=world.data_size,
            accumulate=config.train.accumulate,
        )
    except ValueError as error:
        raise DataError(f"stage {place.name}: {error}") from error

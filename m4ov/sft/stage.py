"""One stage of an arm, on the runtime's loop: rounds of steps, after each of which the skills are measured and the gate
decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from m4ov.data import Mixture
from m4ov.manifest import StageConfig
from m4ov.models.qwen3_vl import Config, Qwen3VL, new
from m4ov.parallel.checkpoint import full_tensors
from m4ov.recipe import OptimConfig, TrainConfig
from m4ov.sft import gates, lora
from m4ov.sft.average import Average
from m4ov.sft.decisions import DecisionLog
from m4ov.sft.parts import freeze
from m4ov.sft.training import loss_of
from m4ov.train import TrainResult, World, train
from m4ov.train.optim import learning_rate_scale

#: Skill → share of right answers of a model, on records that no pool has. Rank 0 alone measures.
Measure = Callable[[Qwen3VL], dict[str, float]]


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
    """

    def __init__(
        self,
        stage: StageConfig,
        place: Place,
        model: Qwen3VL,
        mixture: Mixture,
        measure: Measure,
        log: DecisionLog,
        world: World,
    ) -> None:
        self.stage, self.place, self.model, self.mixture = stage, place, model, mixture
        self.measure, self.log, self.world = measure, log, world
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

        def alone() -> dict[str, float]:
            with self._averaged():
                return self.measure(self.model)

        found = self.world.share("figures", self.world.alone("measuring the skills", alone))
        self.model.train()
        return dict(found)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model with the averages as its weights, and then with its own again, to the bit."""
        if self.average is None:
            yield
            return
        parameters = dict(self.model.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in self.average.averages}
        with torch.no_grad():
            for name, average in self.average.averages.items():
                parameters[name].copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    parameters[name].copy_(value)

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
    mixture: Mixture,
    start: Mapping[str, Tensor],
    *,
    model_config: Config,
    dtype: torch.dtype,
    train_config: TrainConfig,
    optim: OptimConfig,
    measure: Measure,
    log: DecisionLog,
    folder: Path,
    console: Console,
    world: World,
) -> StageEnd:
    """Train a stage, or go on with it. Collective.

    Args:
        mixture: of the stage's pools, with the counts of :func:`images_of` at :func:`first_replay`.
        start: the float32 weights of the whole model, by name.
        dtype: that the model computes in.
        folder: of the stage: checkpoints and metrics.

    Raises:
        Interrupted, CheckpointError, TrainingError, RankError: see :func:`m4ov.train.train`.
        ValueError: there is nothing that LoRA could be put on; see :func:`m4ov.sft.lora.targets`.
    """
    model = _loaded(model_config, start, dtype)
    model.always_vision = world.size > 1
    freeze(model, stage.freeze)
    if stage.lora.rank:
        lora.attach(model, stage.lora, stage.freeze, seed=place.seed)
    torch.manual_seed(place.seed)  # LoRA's dropout
    rounds = Rounds(stage, place, model, mixture, measure, log, world)

    def schedule(step: int) -> float:
        cosine = learning_rate_scale(place.offset + step, place.budget, 0)
        return stage.learning_rate * cosine * min(1.0, (step + 1) / max(1, stage.warmup))

    result = train(
        model,
        mixture,
        loss_of,
        config=replace(train_config, steps=place.most),
        optim=optim,
        folder=folder,
        console=console,
        world=world,
        start=start,
        schedule=schedule,
        callback=rounds,
    )
    trained = result.weights if rounds.average is None else rounds.average.averages
    whole = {name: weight for name, weight in full_tensors(trained, keep=True) if weight is not None}
    weights = dict(start) | whole
    if stage.lora.rank:
        plain = _loaded(model_config, start, torch.float32)
        lora.attach(plain, stage.lora, stage.freeze, seed=place.seed)
        weights = lora.merged(plain, whole)
    return StageEnd(weights, result, rounds.figures, rounds.arm_start, rounds.action)


def _loaded(config: Config, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Qwen3VL:
    model = new(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model

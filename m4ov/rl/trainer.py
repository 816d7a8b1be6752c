"""An online run on the runtime's loop and checkpoints: rollouts are its data, the algorithm its loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import Tensor

from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.recipe import OptimConfig, TrainConfig
from m4ov.rl.algorithms import PolicyBatch, PolicyLoss
from m4ov.rl.reference import Reference
from m4ov.rl.rewards import Rewards
from m4ov.rl.rollouts import Drawn, Prompt, Rollouts, Sampler
from m4ov.rl_recipe import RLConfig
from m4ov.train import TrainResult, World, train
from m4ov.train.metrics import read
from m4ov_kernels import invariant
from m4ov_kernels.packing import Sample

if TYPE_CHECKING:
    from m4ov.generate import Engine, SamplingOptions

FINISHED = ("stop", "stop_string")


class EngineSampler:
    """The embedded engine as a sampler.

    Args:
        engine: of the trained model, with a tokenizer.
        options: of every prompt; its seed is replaced.
    """

    def __init__(self, engine: Engine, options: SamplingOptions) -> None:
        self.engine, self.options = engine, options

    def draw(self, prompts: Sequence[Sample], seeds: Sequence[int]) -> list[list[Drawn]]:
        """See :class:`~m4ov.rl.rollouts.Sampler`."""
        options = [replace(self.options, seed=seed) for seed in seeds]
        return [
            [Drawn(one.tokens, one.logprobs, one.finish_reason in FINISHED, one.text or "") for one in answers]
            for answers in self.engine.generate(prompts, options)
        ]


class _Watch:
    """The loop's callback: moves the reference along, and writes what was seen: ``rl.jsonl``, ``samples.jsonl``."""

    ended = False

    def __init__(self, rollouts: Rollouts, loss: PolicyLoss, reference: Reference, folder: Path, world: World) -> None:
        self.rollouts, self.loss, self.reference, self.world = rollouts, loss, reference, world
        self.log, self.samples = folder / "rl.jsonl", folder / "samples.jsonl"
        self.done = 0

    def tensors(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The reference's, if it is an average."""
        return self.reference.tensors(weights)

    def begin(self, state: dict[str, Any] | None) -> None:
        """Forget what was written behind the step that the run goes on from."""
        self.done = 0 if state is None else state["done"]
        self.reference.begin(resumed=state is not None)
        if self.world.first:
            for path in (self.log, self.samples):
                kept = [row for row in read(path) if row["step"] <= self.done]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def after_step(self, done: int) -> None:
        """What the losses and the newest rollout, if there is one, were like."""
        self.done = done
        self.reference.after_step()
        values = self.loss.window.close(None if self.world.size == 1 else self.world.reduce)
        values |= self.rollouts.metrics
        shown, self.rollouts.metrics, self.rollouts.shown = self.rollouts.shown, {}, []
        if self.world.first:
            _append(self.log, [{"step": done, **values}])
            _append(self.samples, [{"step": done, **sample} for sample in shown])

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def train_policy(
    model: Qwen3VL,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    *,
    config: RLConfig,
    train_config: TrainConfig,
    optim: OptimConfig,
    folder: Path,
    console: Console,
    world: World | None = None,
    start: Mapping[str, Tensor] | None = None,
    schedule: Callable[[int], float] | None = None,
) -> TrainResult:
    """Train a policy by its own answers, or go on with it to the same bits, in the middle of a rollout too. Collective.

    Args:
        model: as the run begins, also where it goes on: a frozen reference is a copy of it.
        prompts: at least as many as a rollout has.
        sampler: draws with ``model``; it sees its weights as they are.
        train_config: ``steps`` are updates; a rollout is good for ``config.rollout.updates`` of them.
        start, schedule: see :func:`m4ov.train.train`.

    Raises:
        RewardError, ValueError: the configuration does not fit; before anything is drawn.
        TrainingError: no prompt tells answers apart, or the loss is not finite.
        Interrupted, CheckpointError, RankError: see :func:`m4ov.train.train`.
    """
    world = world or World()
    with Rewards(config.rewards) as reward:
        reference = Reference(config.algorithm.reference, model)
        loss = PolicyLoss(config.algorithm, config.perception, reference)
        rollouts = Rollouts(model, prompts, sampler, reward, config, world)

        def loss_of(policy: Any, batch: PolicyBatch) -> tuple[Tensor, int]:
            with invariant() if config.rollout.shared else nullcontext():
                return loss(policy, batch)

        return train(
            model,
            rollouts,
            loss_of,
            config=train_config,
            optim=optim,
            folder=folder,
            console=console,
            world=world,
            start=start,
            schedule=schedule,
            callback=_Watch(rollouts, loss, reference, folder, world),
        )

"""The training loop: batches by step number, checkpoints by time, and a restart that goes on to the same bits."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

import m4ov_kernels
from m4ov.recipe import OptimConfig, TrainConfig
from m4ov.train import checkpoint
from m4ov.train.metrics import Metrics
from m4ov.train.optim import Optimizer
from m4ov.train.progress import TrainingProgress, clock


class Batch(Protocol):
    """What the loop must know of a batch."""

    @property
    def tokens(self) -> int: ...


B = TypeVar("B", bound=Batch)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a request to end; a checkpoint was written."""


class TrainingError(RuntimeError):
    """The training cannot go on; the message says at which step and why."""


@dataclass(frozen=True)
class TrainResult:
    """What a training did.

    Attributes:
        weights: the float32 weights at the end, by parameter name.
        steps: steps of the whole run.
        resumed_at: the step at which this process went on; 0 for a run from the start.
        seconds: time spent in training, over all processes of the run.
        tokens: tokens trained on, over all processes of the run.
    """

    weights: dict[str, Tensor]
    steps: int
    resumed_at: int
    seconds: float
    tokens: int


def train(
    model: nn.Module,
    batch_of_step: Callable[[int], B],
    loss_of: Callable[[nn.Module, B], Tensor],
    *,
    config: TrainConfig,
    optim: OptimConfig,
    folder: Path,
    console: Console,
) -> TrainResult:
    """Train to ``config.steps`` steps, from the newest checkpoint in ``folder`` if there is one.

    Args:
        model: in the dtype it computes in; on return it holds the trained weights.
        batch_of_step: the batch of a step, a function of the step alone.
        loss_of: the scalar loss of a batch.
        folder: of the run: ``checkpoints/``, ``metrics.jsonl`` and ``tensorboard/`` go there.

    Raises:
        Interrupted: SIGINT or SIGTERM came: the step was finished and a checkpoint written.
        CheckpointError: a checkpoint cannot be written or read.
        TrainingError: the loss is not a finite number.
    """
    optimizer = Optimizer(model, optim, config.steps)
    checkpoints = folder / "checkpoints"
    start, seconds, tokens = 0, 0.0, 0
    found = checkpoint.load_newest(checkpoints)
    if found is not None:
        tensors, state = found
        optimizer.restore(tensors)
        checkpoint.set_random_state(state["random_state"])
        start, seconds, tokens = state["step"], state["seconds"], state["tokens"]
        console.print(f"going on at step {start} of {config.steps} ({clock(seconds)} trained)")
    else:
        optimizer.publish()

    def save(step: int) -> None:
        state = {"random_state": checkpoint.random_state(), "seconds": seconds, "tokens": tokens}
        checkpoint.save(checkpoints, step, optimizer.tensors(), state, keep=config.keep_checkpoints)

    model.train()
    metrics = Metrics(folder, start)
    losses: list[float] = []
    saved_at, saved_when = start, time.monotonic()
    try:
        with _stop_requests() as stop, TrainingProgress(console, config.steps, start) as progress:
            for step in range(start, config.steps):
                began = time.perf_counter()
                batch = batch_of_step(step)
                loss = loss_of(model, batch)
                loss.backward()
                norm = optimizer.step(step)
                losses.append(loss.item())
                m4ov_kernels.check()
                if not (abs(losses[-1]) < float("inf") and torch.isfinite(norm)):
                    raise TrainingError(f"step {step}: loss {losses[-1]}, gradient norm {norm.item()}")
                took = time.perf_counter() - began
                seconds, tokens, done = seconds + took, tokens + batch.tokens, step + 1
                progress.update(done, losses[-1], batch.tokens, took)
                if done % config.log_every == 0 or done == config.steps:
                    metrics.write(
                        done,
                        {
                            "loss": sum(losses) / len(losses),
                            "gradient_norm": norm.item(),
                            "learning_rate": optimizer.parts[-1].param_groups[0]["lr"],
                            "tokens_per_second": batch.tokens / progress.seconds_a_step,
                            "seconds": seconds,
                        },
                    )
                    losses.clear()
                due = config.checkpoint_seconds and time.monotonic() - saved_when > config.checkpoint_seconds
                due = due or (config.checkpoint_steps and done % config.checkpoint_steps == 0)
                if due or stop.is_set() or done == config.steps:
                    save(done)
                    saved_at, saved_when = done, time.monotonic()
                if stop.is_set() and done < config.steps:
                    raise Interrupted(f"stopped after step {saved_at}; the same command goes on from there")
    finally:
        metrics.close()
    weights = {name: weight.detach() for name, weight in zip(optimizer.names, optimizer.weights, strict=True)}
    return TrainResult(weights, config.steps, start, seconds, tokens)


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one acts as it did before."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    former: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: FrameType | None) -> None:
        requested.set()
        signal.signal(number, former[number])

    for number in former:
        signal.signal(number, request)
    try:
        yield requested
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)

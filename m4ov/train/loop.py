"""The training loop, on one rank or many: a step's samples are spread over the ranks, its loss is the mean over all of
their tokens, checkpoints come by time, and a restart goes on to the same bits."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

import m4ov_kernels
from m4ov.parallel.checkpoint import Checkpoints
from m4ov.recipe import OptimConfig, TrainConfig
from m4ov.train import machine
from m4ov.train.metrics import Metrics
from m4ov.train.optim import Optimizer
from m4ov.train.progress import TrainingProgress, clock
from m4ov.train.world import World


class Batch(Protocol):
    """What the loop must know of a batch."""

    @property
    def tokens(self) -> int: ...


B = TypeVar("B", bound=Batch)
B_co = TypeVar("B_co", bound=Batch, covariant=True)


class Data(Protocol[B_co]):
    """Where batches come from. Which samples a step has, and how they are augmented, must not depend on the ranks."""

    def batches(self, step: int) -> Sequence[B_co]:
        """This rank's share of a step, in as many batches as it takes one after the other. Steps come in order."""

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, as JSON has it; the same on every rank, whatever their number."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class Callback(Protocol):
    """What goes along with a training and may end it; the same on every rank.

    Attributes:
        ended: nothing is left to train; asked before the first step, and after each.
    """

    ended: bool

    def tensors(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Given the float32 weights that are trained, by name: what it keeps of its own, which checkpoints hold too.
        Names must not be the optimizer's."""

    def begin(self, state: dict[str, Any] | None) -> None:
        """Before the first step, the weights are in the model; ``state``: what :meth:`state_dict` gave at the step
        that the training goes on from, ``None`` at its start."""

    def after_step(self, done: int) -> None:
        """After ``done`` steps; then the checkpoint is written, if one is due."""

    def state_dict(self) -> dict[str, Any]:
        """What it needs to go on, as JSON has it."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a request to end; a checkpoint was written."""


class TrainingError(RuntimeError):
    """The training cannot go on; the message says at which step and why."""


@dataclass(frozen=True)
class TrainResult:
    """What a training did.

    Attributes:
        weights: the float32 weights at the end, of the parameters that require gradients, by name; DTensors where the
            model's parameters are.
        steps: steps of the whole run.
        resumed_at: the step at which this process went on; 0 for a run from the start.
        seconds: time spent in training, over all processes of the run.
        tokens: tokens trained on, by all ranks, over all processes of the run.
    """

    weights: dict[str, Tensor]
    steps: int
    resumed_at: int
    seconds: float
    tokens: int


def train(
    model: nn.Module,
    data: Data[B],
    loss_of: Callable[[nn.Module, B], tuple[Tensor, int]],
    *,
    config: TrainConfig,
    optim: OptimConfig,
    folder: Path,
    console: Console,
    world: World | None = None,
    flops_of: Callable[[B], float] | None = None,
    start: Mapping[str, Tensor] | None = None,
    schedule: Callable[[int], float] | None = None,
    callback: Callback | None = None,
) -> TrainResult:
    """Train to ``config.steps`` steps, from the newest checkpoint in ``folder`` if there is one. Collective.

    Args:
        model: in the dtype it computes in; on return it holds the trained weights. Plain parameters are replicated:
            equal on every rank, their gradients are summed here. DTensors are sharded by whoever made them, and their
            gradients arrive as sums over all samples (FSDP: a gradient divide factor of 1). Parameters that do not
            require gradients stay as they are, and are in no checkpoint.
        data: of this rank.
        loss_of: the *sum* of the token losses of a batch, a scalar, and how many tokens it is the sum of. The loss
            of a step, and what is differentiated, is the sum over all batches of all ranks over the number of all.
        folder: of the run: ``checkpoints/``, ``metrics.jsonl`` and ``tensorboard/`` go there, from rank 0 alone.
        world: the ranks; ``None``: this one alone.
        flops_of: the model FLOPs of a batch, forward and backward, for the MFU; ``None``: no MFU.
        start: float32 weights to begin with, by name, where the model's own are rounded.
        schedule: step (from 0) → factor on the learning rates; ``None``: warm-up and cosine over ``config.steps``.
        callback: called around the steps; may end the training before ``config.steps``.

    Raises:
        Interrupted: SIGINT or SIGTERM came to some rank: all finished the step, and a checkpoint was written.
        CheckpointError: a checkpoint cannot be written or read.
        TrainingError: the loss is not a finite number, or a step has no token to learn from.
        RankError: another rank ended, or did not come to a collective in time.
    """
    world = world or World()
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    optimizer = Optimizer(model, optim, config.steps, world, muon_dtype=dtype, schedule=schedule)
    optimizer.begin_with(start or {})
    others = {} if callback is None else callback.tensors(optimizer.named())
    saved = Checkpoints(
        folder / "checkpoints",
        keep=config.keep_checkpoints,
        rank=world.rank,
        size=world.size,
        timeout_seconds=config.timeout_seconds,
    )
    began_at, seconds, tokens = 0, 0.0, 0
    if world.data_rank:
        torch.manual_seed(torch.initial_seed() + world.data_rank)  # ranks drop out different units
    state = saved.load(optimizer.tensors() | others)
    if state is not None:
        began_at, seconds, tokens = state["step"], state["seconds"], state["tokens"]
        data.load_state_dict(state["data"])
        console.print(f"going on at step {began_at} of {config.steps} ({clock(seconds)} trained)")
    optimizer.publish()
    if callback is not None:
        callback.begin(None if state is None else state["callback"])

    peak = 0.0
    if flops_of is not None:
        rate, source = machine.peak_flops(dtype, config.peak_tflops)
        (peak,) = world.reduce("peak rate", [rate])
        console.print(f"MFU is of {peak / 1e12:.3g} TFLOP/s ({source}{f', {world.size} ranks' * (world.size > 1)})")
    model.train()
    metrics = Metrics(folder, began_at, config.wandb) if world.first else None
    window = _Window()
    saved_at, saved_when, done = began_at, time.monotonic(), began_at
    try:
        with _stop_requests(world.size == 1) as stop, TrainingProgress(console, config.steps, began_at) as progress:
            for step in range(began_at, config.steps):
                if callback is not None and callback.ended:
                    break
                began, world.seconds = time.perf_counter(), 0.0
                batches = data.batches(step)
                waited = time.perf_counter() - began
                losses: list[Tensor] = []
                labels = work = 0.0
                for batch in batches:
                    with world.watched(f"step {step}: forward and backward"):
                        loss, count = loss_of(model, batch)
                        loss.backward()
                    optimizer.accumulate()
                    losses.append(loss.detach())
                    labels += count
                    work += flops_of(batch) if flops_of is not None else 0.0
                # One small sum holds the step together: what it is the mean of, and whether anyone is to stop.
                due = config.checkpoint_seconds and time.monotonic() - saved_when > config.checkpoint_seconds
                own = [
                    float(sum(loss.item() for loss in losses)),
                    labels,
                    float(sum(batch.tokens for batch in batches)),
                    work,
                    float(stop.is_set()),
                    float(bool(due) and world.first),  # rank 0's clock
                ]
                total, labels, trained, work, stopping, due = world.reduce(f"step {step}: sum of the losses", own)
                copies = world.size / world.data_size  # ranks that have the same samples
                m4ov_kernels.check()
                if not labels or not abs(total) < float("inf"):
                    of = f"loss {total / labels}" if labels else "no token has a label"
                    raise TrainingError(f"step {step}: {of}")
                norm = optimizer.step(step, labels / copies).item()
                if not norm < float("inf"):
                    raise TrainingError(f"step {step}: loss {total / labels}, gradient norm {norm}")
                took, done = time.perf_counter() - began, step + 1
                seconds, tokens = seconds + took, tokens + round(trained / copies)
                load = own[3] if flops_of is not None else own[2]  # the others wait for the rank that has most
                window.add(total / labels, trained / copies, work / copies, took, waited, world.seconds, load)
                progress.update(done, total / labels, round(trained / copies), took)
                if callback is not None:
                    callback.after_step(done)
                last = done == config.steps or (callback is not None and callback.ended)
                if done % config.log_every == 0 or last:
                    values = window.close(world, done, peak)
                    if metrics is not None:
                        rates = {"learning_rate": optimizer.parts[-1].param_groups[0]["lr"], "seconds": seconds}
                        metrics.write(done, {**values, "gradient_norm": norm, **rates})
                due = due or (config.checkpoint_steps and done % config.checkpoint_steps == 0)
                if due or stopping or last:
                    state = {"seconds": seconds, "tokens": tokens, "data": data.state_dict()}
                    state |= {} if callback is None else {"callback": callback.state_dict()}
                    saved.save(done, optimizer.tensors() | others, state)
                    saved_at, saved_when = done, time.monotonic()
                if stopping and not last:
                    saved.wait()
                    raise Interrupted(f"stopped after step {saved_at}; the same command goes on from there")
            saved.wait()
    finally:
        if metrics is not None:
            metrics.close()
    return TrainResult(optimizer.named(), done, began_at, seconds, tokens)


class _Window:
    """What the steps since the last line of metrics were like."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, ...]] = []

    def add(self, *row: float) -> None:
        self.rows.append(row)

    def close(self, world: World, step: int, peak: float) -> dict[str, float]:
        """The line, and a new window. Collective."""
        loss, tokens, work, took, waited, talked, load = (sum(column) for column in zip(*self.rows, strict=True))
        steps = len(self.rows)
        self.rows.clear()
        own = [machine.peak_mib() or 0.0, waited, talked, load]
        worst = world.reduce(f"step {step}: metrics", own, largest=True)
        values = {
            "loss": loss / steps,
            "tokens_per_second": tokens / took,
            "peak_memory_mib": worst[0],  # of the rank that has the highest, as are the next two
            "data_wait_seconds": worst[1] / steps,
            "communication_seconds": worst[2] / steps,
            "step_seconds": took / steps,
        }
        if world.size > 1:  # the most model FLOPs (tokens, if nobody counts them) of a rank over the mean of all
            values["imbalance"] = worst[3] * world.data_size / (work or tokens)
        return values | ({"mfu": work / took / peak} if peak else {})


@contextmanager
def _stop_requests(alone: bool) -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one acts as it did before, if this rank is alone.

    At Ctrl-C a rank of torchrun hears from the terminal and from torchrun, which kills after 30 seconds anyway.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    former: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: FrameType | None) -> None:
        requested.set()
        if alone:
            signal.signal(number, former[number])

    for number in former:
        signal.signal(number, request)
    try:
        yield requested
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)

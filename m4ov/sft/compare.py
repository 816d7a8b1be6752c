"""The same steps with and without the patch, side by side in two processes: time, memory, loss."""

from __future__ import annotations

import multiprocessing
import pickle
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from m4ov.data import Mixture, Pool
from m4ov.quickstart_recipe import QuickstartConfig
from m4ov.sft.task import DTYPES, Task
from m4ov_kernels.packing import PackedBatch


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        seconds: of each step: forward, backward, optimizer.
        losses: of each step.
        peak_mib: the most memory the process held during the steps; ``None`` where it cannot be observed.
        held_mib: what it held before the first one (libraries, model, optimizer).
    """

    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    peak_mib: float | None
    held_mib: float | None

    @property
    def step_seconds(self) -> float:
        """Median over the steps behind the first two."""
        return statistics.median(self.seconds[2:] or self.seconds)


@dataclass(frozen=True)
class Comparison:
    """20 steps patched and 20 not: the same model, batches, optimizer and order of steps."""

    patched: Side
    unpatched: Side
    steps: int
    samples: int
    tokens: int
    patch: str

    @property
    def speedup(self) -> float:
        return self.unpatched.step_seconds / self.patched.step_seconds

    @property
    def loss_differences(self) -> tuple[float, ...]:
        """Patched minus unpatched, step by step; both train on, so rounding differences grow."""
        return tuple(ours - theirs for ours, theirs in zip(self.patched.losses, self.unpatched.losses, strict=True))


def compare(config: QuickstartConfig, task: Task, pools: Mapping[str, Pool], images: Mapping[str, int]) -> Comparison:
    """Train two copies of the same random model for ``config.compare.steps`` steps, one patched, step about.

    Two processes, so that each has its own peak of memory; while one works the other waits, so that both meet the same
    machine. Both get the packed batch as it is.

    Args:
        pools: by name.
        images: pool → how many of its images a step has.

    Raises:
        RuntimeError: one of the processes failed; with its error.
    """
    options, mixed = config.compare, [pools[name] for name in images]
    mixture = Mixture(mixed, images, task.encoder, seed=config.run.seed, dtype=task.dtype)
    context = multiprocessing.get_context("spawn")
    sides = []
    for patched in (True, False):
        here, there = context.Pipe()
        arguments = (there, task.model_config.to_dict(), config, patched, torch.get_num_threads())
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        there.close()
        sides.append((process, here))
    try:
        described = [_answer(pipe) for _, pipe in sides]
        samples = tokens = 0
        for step in range(options.steps):
            batch = mixture.batch(step)
            samples, tokens = samples + len(batch.lengths), tokens + batch.tokens
            message = pickle.dumps(batch)
            for _, pipe in sides:
                pipe.send_bytes(message)
                _answer(pipe)
        results = []
        for _, pipe in sides:
            pipe.send_bytes(b"")
            results.append(_answer(pipe))
    finally:
        for process, pipe in sides:
            pipe.close()
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()
    return Comparison(
        patched=results[0],
        unpatched=results[1],
        steps=options.steps,
        samples=samples // options.steps,
        tokens=tokens // options.steps,
        patch=described[0],
    )


def _answer(pipe: Connection) -> Any:
    try:
        kind, value = pipe.recv()
    except EOFError:
        raise RuntimeError("compare: a worker process ended without an answer (killed, or out of memory?)") from None
    if kind == "error":
        raise RuntimeError(f"compare: {value}")
    return value


def _work(
    pipe: Connection, model_config: dict[str, Any], config: QuickstartConfig, patched: bool, threads: int
) -> None:
    try:
        torch.set_num_threads(threads)
        _steps(pipe, model_config, config, patched)
    except Exception as error:
        pipe.send(("error", f"{'patched' if patched else 'unpatched'} side: {type(error).__name__}: {error}"))


def _steps(pipe: Connection, model_config: dict[str, Any], config: QuickstartConfig, patched: bool) -> None:
    from m4ov.models.qwen3_vl import build, cast_parameters, config_of
    from m4ov.sft.training import loss_of
    from m4ov.train import Optimizer
    from m4ov.train.machine import peak_mib, reset_peak_mib
    from m4ov_kernels.patches import patch

    model = build(config_of(model_config), config.run.seed)
    report = str(patch(model)) if patched else ""
    dtype = DTYPES[config.train.precision]
    cast_parameters(model, dtype).train()
    optimizer = Optimizer(model, config.optim, config.train.steps, muon_dtype=dtype)
    optimizer.publish()
    held = reset_peak_mib()
    pipe.send(("ready", report))
    seconds: list[float] = []
    losses: list[float] = []
    while message := pipe.recv_bytes():
        batch: PackedBatch = pickle.loads(message)
        began = time.perf_counter()
        loss, labels = loss_of(model, batch)
        loss.backward()
        optimizer.step(len(seconds), labels)
        losses.append(loss.item() / labels)
        seconds.append(time.perf_counter() - began)
        pipe.send(("done", None))
    pipe.send(("result", Side(tuple(seconds), tuple(losses), peak_mib(), held)))

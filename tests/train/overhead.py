"""What the loop costs over a bare step (forward, backward, the same optimizer's update), on one rank.

``python -m tests.train.overhead`` takes the two by turns on batches like the quickstart's, in one process, each with a
model of its own that learns; making the batches counts for neither. Reductions, checks, metrics, TensorBoard, the
progress bar and the requests to stop count for the loop; the quickstart's checkpoint, once in 30 s, is timed apart.
Give it the machine alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from m4ov import allocator

if __name__ == "__main__":
    allocator.ensure()  # as the quickstart does, before torch is imported

import torch
from rich.console import Console

from m4ov import config as recipes
from m4ov import sft
from m4ov.data import Mixture
from m4ov.models.qwen3_vl import training_flops
from m4ov.parallel.checkpoint import Checkpoints
from m4ov.quickstart_recipe import QuickstartConfig
from m4ov.sft.stage import first_replay, images_of
from m4ov.sft.training import loss_of, model_of
from m4ov.train import Optimizer, command, train
from m4ov_kernels.packing import PackedBatch
from tests.tiny_task import tiny_material

WARM = 3  # steps that set up


class Turns:
    """The data of the loop. Asked for a step, it makes a bare one first, and notes how long the loop took for its last.

    Attributes:
        bare, loop: seconds of the steps.
    """

    def __init__(self, material: sft.Material, config: QuickstartConfig) -> None:
        stage, task = next(iter(config.stages.values())), material.task
        counts = images_of(stage, first_replay(stage), config.data.images_per_step)
        self.mixture = Mixture(list(material.pools.values()), counts, task.encoder, seed=0, dtype=task.dtype)
        self.model = model_of(config, task, config.run.seed).train()
        self.optimizer = Optimizer(self.model, config.optim, config.train.steps, muon_dtype=task.dtype)
        self.bare: list[float] = []
        self.loop: list[float] = []
        self.began: float | None = None

    def batches(self, step: int) -> Sequence[PackedBatch]:
        if self.began is not None:
            self.loop.append(time.perf_counter() - self.began)
        made = self.mixture.batches(step)
        began = time.perf_counter()
        for batch in made:
            loss, labels = loss_of(self.model, batch)
            loss.backward()
            self.optimizer.step(step, labels)
        self.bare.append(time.perf_counter() - began)
        self.began = time.perf_counter()
        return made

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass

    def checkpoint_seconds(self, folder: Path) -> float:
        """How long a save holds the training up; it is written in the background."""
        saved, seconds = Checkpoints(folder, keep=1), []
        for step in range(4):
            began = time.perf_counter()
            saved.save(step, self.optimizer.tensors(), {})
            seconds.append(time.perf_counter() - began)
            saved.wait()
        return statistics.median(seconds[1:])


def measure(steps: int, threads: int) -> str:
    command.set_up(threads)
    config = recipes.load(QuickstartConfig, "quickstart", [f"train.steps={steps + WARM + 1}"])
    pools = tiny_material().pools  # the packaged questions, about as many as are produced, on the same images
    material = sft.material_of(config.manifest(), pools, {}, {})
    task = material.task
    turns = Turns(material, config)
    with tempfile.TemporaryDirectory() as name:
        train(
            model_of(config, task, config.run.seed),
            turns,
            loss_of,
            config=config.train,
            optim=config.optim,
            folder=Path(name),
            console=Console(quiet=True),
            flops_of=lambda batch: training_flops(task.model_config, batch),
        )
        held_up = turns.checkpoint_seconds(Path(name) / "apart")
    bare, loop = turns.bare[WARM : WARM + steps], turns.loop[WARM : WARM + steps]
    ratio = statistics.median(one / other for one, other in zip(loop, bare, strict=True))
    every = config.train.checkpoint_seconds
    return (
        f"{steps} steps by turns, {torch.get_num_threads()} threads, {config.train.precision}: "
        f"bare {statistics.median(bare) * 1e3:.1f} ms, loop {statistics.median(loop) * 1e3:.1f} ms (medians); "
        f"loop over bare, median of pairs: {ratio - 1:+.2%}; "
        f"a checkpoint holds it up for {held_up * 1e3:.0f} ms in {every:g} s: {held_up / every:+.2%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch (default: as the quickstart has them)")
    options = parser.parse_args()
    print(measure(options.steps, options.threads))


if __name__ == "__main__":
    main()

"""A run that was killed or interrupted goes on to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m4ov.parallel.checkpoint import checkpoints, read
from m4ov.recipe import OptimConfig, TrainConfig
from m4ov.train import Interrupted, TrainingError, train
from m4ov.train.metrics import read as read_metrics
from tests.tiny_task import equal_states, quiet, tiny_config, train_stage

# Trains a stage, and stops for ever behind a step, so that the kill comes at a known place.
WORKER = """
import sys, time
from pathlib import Path
import torch
from m4ov.sft import stage as module
from tests.tiny_task import tiny_config, train_stage

torch.set_num_threads(1)
folder, stop_at = Path(sys.argv[1]), int(sys.argv[2])
steps = 0

def loss_of(model, batch, mesh=None):
    global steps
    steps += 1
    if steps == stop_at:
        while not (folder / "checkpoints" / "step-00000002").exists():  # it is written in the background
            time.sleep(0.01)
        print("here", flush=True)
        time.sleep(600)
    return original(model, batch)

original, module.loss_of = module.loss_of, loss_of
train_stage(tiny_config(folder, precision="bf16", checkpoint_steps=2), folder)
print("done", flush=True)
"""


def start(folder: Path, stop_at: int) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), str(stop_at)], stdout=subprocess.PIPE, text=True, env=environment
    )


def whole_run(folder: Path) -> None:
    """The same run without an end in between, in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = tiny_config(folder, precision="bf16", checkpoint_steps=2)
        train_stage(config, folder)
    finally:
        torch.set_num_threads(threads)


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    newest = checkpoints(folder / "checkpoints")[-1]
    assert json.loads((newest / "state.json").read_text())["step"] == 6
    # Nobody seeds the generators of a process that begins, and this training draws from none of them.
    return {name: tensor for name, tensor in read(newest, prefix="") if not name.startswith("random.")}


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    """kill -9 inside the fourth step: the run goes on from the checkpoint behind the second."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(killed, stop_at=4)
    assert process.stdout.readline().strip() == "here"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in checkpoints(killed / "checkpoints")] == ["step-00000002"]
    whole_run(whole)
    whole_run(killed)  # goes on
    assert equal_states(final_state(whole), final_state(killed))
    model = [load_file(folder / "model" / "model.safetensors") for folder in (whole, killed)]
    assert equal_states(*model)
    losses = [
        [(row["step"], row["loss"]) for row in read_metrics(folder / "metrics.jsonl")] for folder in (whole, killed)
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == [1, 2, 3, 4, 5, 6]


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path):
    process = start(tmp_path, stop_at=4)
    assert process.stdout.readline().strip() == "here"
    process.send_signal(signal.SIGINT)  # noted; the sleep goes on
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000002"]


class Counter(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))


class Number:
    tokens = 1

    def __init__(self, step: int) -> None:
        self.step = step


class Numbers:
    """Each step its own number; counts the steps that it was asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def batches(self, step: int) -> list[Number]:
        self.asked += 1
        return [Number(step)]

    def state_dict(self) -> dict:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict) -> None:
        self.asked = state["asked"]


def train_counter(folder: Path, after_step: int = -1, action: object = None, bad: float = 0.0, steps: int = 6):
    def loss_of(model: Counter, batch: Number) -> tuple[torch.Tensor, int]:
        if batch.step == after_step and callable(action):
            action()
        return ((model.weight - batch.step) ** 2).sum() + (bad if batch.step == 3 else 0.0), 3

    config = TrainConfig(steps=steps, checkpoint_seconds=0.0, log_every=1)
    data = Numbers()
    found = train(Counter(), data, loss_of, config=config, optim=OptimConfig(), folder=folder, console=quiet())
    assert data.asked == steps  # over all processes of the run
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_the_step_that_runs_and_the_run_goes_on(tmp_path, number):
    whole = train_counter(tmp_path / "whole")
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped after step 4"):
        train_counter(tmp_path / "run", 3, lambda: os.kill(os.getpid(), number))
    assert signal.getsignal(number) is handler
    again = train_counter(tmp_path / "run")
    assert again.resumed_at == 4
    assert again.tokens == whole.tokens == 6
    assert equal_states(again.weights, whole.weights)
    assert train_counter(tmp_path / "run").resumed_at == 6  # nothing left to do


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    for bad in (float("nan"), float("inf")):
        with pytest.raises(TrainingError, match="step 3: loss"):
            train_counter(tmp_path / str(bad), bad=bad)

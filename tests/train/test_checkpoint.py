"""Checkpoints under failure: nothing half-written, earlier ones intact, errors that name the file."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from m4ov.train import CheckpointError, RunFolder, RunFolderError, write_text
from m4ov.train.checkpoint import checkpoints, load_newest, random_state, save, set_random_state
from m4ov.train.metrics import Metrics, read

TENSORS = {"weight": torch.arange(5.0), "step": torch.tensor(3.0)}


def test_a_checkpoint_comes_back_to_the_bit(tmp_path):
    random = torch.randn(100)
    save(tmp_path, 7, {"a": random, "b": random.bfloat16()[::2]}, {"seconds": 1.5}, keep=2)
    tensors, state = load_newest(tmp_path)
    assert torch.equal(tensors["a"], random)
    assert torch.equal(tensors["b"], random.bfloat16()[::2])
    assert state == {"seconds": 1.5, "step": 7}


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 9):
        save(tmp_path, step, TENSORS, {}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000009", "step-00000010"]
    assert load_newest(tmp_path)[1]["step"] == 10
    assert load_newest(tmp_path / "nothing") is None


def test_the_random_state_comes_back():
    state = random_state()
    first = torch.randn(5)
    set_random_state(state)
    assert torch.equal(torch.randn(5), first)


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = save(tmp_path, 4, TENSORS, {}, keep=2)
    file = path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="step-00000004"):
        load_newest(tmp_path)


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from m4ov.train.checkpoint import CheckpointError, save
folder = Path(sys.argv[1])
save(folder, 1, {"weight": torch.zeros(10)}, {}, keep=2)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(folder, 2, {"weight": torch.zeros(1_000_000)}, {}, keep=2)
except CheckpointError as error:
    print(error)
"""


def test_a_full_disk_leaves_earlier_checkpoints(tmp_path):
    child = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "step-00000002: cannot be written" in child.stdout
    assert "earlier ones are intact" in child.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    tensors, _ = load_newest(tmp_path)
    assert torch.equal(tensors["weight"], torch.zeros(10))


def test_what_a_crash_left_is_cleared(tmp_path):
    left = tmp_path / ".writing-123"
    left.mkdir()
    (left / "state.safetensors").write_bytes(b"half")
    assert load_newest(tmp_path) is None
    save(tmp_path, 1, TENSORS, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_an_unwritable_run_folder_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    for path in (file, file / "below", "/proc/m4ov"):
        with pytest.raises(RunFolderError, match=f"{path}: cannot be written.*run.folder=PATH"):
            RunFolder(path, {})
    if os.geteuid() != 0:  # permissions do not bind root
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        with pytest.raises(RunFolderError, match=r"cannot be written \(Permission denied\)"):
            RunFolder(closed, {})


def test_a_run_folder_belongs_to_one_run_and_one_process(tmp_path):
    folder = RunFolder(tmp_path / "run", {"optim.lr": 0.1, "model.betas": [1, 2]})
    with pytest.raises(RunFolderError, match="another process is running"):
        RunFolder(tmp_path / "run", {"optim.lr": 0.1, "model.betas": [1, 2]})
    folder.close()
    RunFolder(tmp_path / "run", {"optim.lr": 0.1, "model.betas": [1, 2]}).close()
    with pytest.raises(RunFolderError, match=r"another optim\.lr \(0\.1 there, 0\.2 now\)"):
        RunFolder(tmp_path / "run", {"optim.lr": 0.2, "model.betas": [1, 2]})


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.html"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    with pytest.raises(RunFolderError, match="cannot be written"):
        write_text(tmp_path / "no" / "report.html", "x")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_metrics_forget_what_is_trained_again(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in (1, 2, 3, 4):
        metrics.write(step, {"loss": 1.0 / step})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # cut off by a crash
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    metrics = Metrics(tmp_path, 2)
    metrics.write(3, {"loss": 9.0})
    metrics.close()
    assert [(row["step"], row["loss"]) for row in read(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 0.5), (3, 9.0)]

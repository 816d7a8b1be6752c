"""The run folder and what is written there: one run, one process, errors that name the file, nothing half-written."""

from __future__ import annotations

import importlib.util
import os

import pytest

from m4ov.data import WriteError
from m4ov.data.whole import write_whole
from m4ov.train import MetricsError, RunFolder, RunFolderError
from m4ov.train.metrics import Metrics, read


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


def test_what_is_known_later_belongs_to_the_run_too(tmp_path):
    folder = RunFolder(tmp_path, {"optim.lr": 0.1})
    folder.claim({"records": "abc"}, "data.json")
    folder.claim({"records": "abc"}, "data.json")
    with pytest.raises(RunFolderError, match=r"holds a run with another records \(abc there, abd now\)"):
        folder.claim({"records": "abd"}, "data.json")
    folder.close()
    RunFolder(tmp_path, {"optim.lr": 0.1}).close()


def test_a_refused_folder_is_let_go(tmp_path):
    RunFolder(tmp_path, {"optim.lr": 0.1}).close()
    with pytest.raises(RunFolderError, match="another optim"):
        RunFolder(tmp_path, {"optim.lr": 0.2})
    RunFolder(tmp_path, {"optim.lr": 0.1}).close()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "below" / "report.html"
    write_whole(path, "one")
    write_whole(path, "two")
    assert path.read_text() == "two"
    with pytest.raises(WriteError, match="cannot be written"):
        write_whole(path / "report.html", "x")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


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


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_asked_for_and_not_there_is_an_error(tmp_path):
    with pytest.raises(MetricsError, match=r"train\.wandb=mine: the package wandb is not installed; pip install wandb"):
        Metrics(tmp_path, 0, "mine")
    assert list(tmp_path.iterdir()) == []

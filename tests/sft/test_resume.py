"""kill -9 of a curriculum, wherever it is: what goes on takes the same decisions and ends with the same bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from m4ov.parallel import ranks
from m4ov.sft.decisions import DecisionLog
from m4ov.sft.decisions import read as read_decisions
from tests.sft import small
from tests.tiny_task import equal_states

# Each of them in a process that goes on where the one before was killed: (event, which of its kind in that process).
KILLS = (
    ("loss", 4),  # inside a step, in the middle of a round
    ("decided", 1),  # the decision is in the log, and in no checkpoint
    ("saved", 1),  # the model of the first stage stands, the stage is not marked as done
    ("measured", 2),  # while a round of the second stage is measured
)


def kill(folder: Path, event: str, number: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*ranks.PRELOAD, "tests.sft.small", "torch.utils.tensorboard"])
    process = context.Process(target=small.train_and_wait, args=(folder, event, number))
    process.start()
    marker, deadline = folder / f"at-{event}-{process.pid}", time.monotonic() + 60
    while not marker.exists():
        assert process.is_alive(), f"ended with {process.exitcode} before {event} {number}"
        assert time.monotonic() < deadline, f"{event} {number} did not come"
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_curriculum_takes_the_same_decisions_and_ends_with_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        end = small.train_arm(whole)
        lines = []
        for event, number in KILLS:
            kill(killed, event, number)
            lines.append(len(read_decisions(killed / "curriculum" / "decisions.jsonl")))
        again = small.train_arm(killed)
    finally:
        torch.set_num_threads(threads)
    assert lines == [2, 3, 4, 5]  # what was decided when it was killed; some of it is taken back
    assert (again.steps, again.tokens, again.figures) == (end.steps, end.tokens, end.figures)
    homes = [folder / "curriculum" for folder in (whole, killed)]
    logs = [(home / "decisions.jsonl").read_text() for home in homes]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 7
    assert equal_states(*(load_file(home / "model" / "model.safetensors") for home in homes))
    for home in homes:
        names = {path.name for path in home.iterdir()}
        assert names == {"1-first", "2-second", "model", "arm.json", "decisions.jsonl"}
        assert not list(home.glob("*/checkpoints"))
    assert small.train_arm(killed) == again  # done: nothing is trained again


def test_a_log_forgets_what_came_later_and_what_a_crash_cut_off(tmp_path):
    log = DecisionLog(tmp_path / "arm" / "decisions.jsonl")
    log.go_on(1, -1)
    rows = [{"stage": 1, "step": 0}, {"stage": 1, "step": 4}, {"stage": 2, "step": 0}, {"stage": 2, "step": 2}]
    for row in rows:
        log.write(row)
    with log.path.open("a") as file:
        file.write('{"stage": 2, "st')
    assert log.rows() == rows
    log.go_on(2, 0)
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == rows[:3]
    log.go_on(2, -1)
    assert log.rows() == rows[:2]
    silent = DecisionLog(tmp_path / "rank-1" / "decisions.jsonl", writes=False)
    silent.go_on(1, -1)
    silent.write(rows[0])
    assert not silent.path.parent.exists()

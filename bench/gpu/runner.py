"""Runs the stages as processes within a budget of time, and writes the results anew whenever one ends.

A stage that crashes, hangs or is killed leaves the results of all others, and of its own all that it had written.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from m4ov_bench.gpu.part import FAILED, NOT_RUN, PASSED
from m4ov_bench.gpu.stages import MACHINE, Stage, plan

CRASHED, CUT_OFF = "crashed", "cut off"
_TAIL = 1500  # characters of a failed stage's output that are kept in the results
_POLL = 0.1
_LEAST = 3.0  # seconds: with less left, a stage is not started


@dataclass
class Outcome:
    """``status``: passed, failed (a check is red), crashed (it ended without finishing), cut off (its time was up), or
    not run (none of its checks could be judged here)."""

    stage: Stage
    status: str
    seconds: float = 0.0
    problem: str = ""
    log: str = ""  # the end of its output, if it did not end well
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def part(self) -> dict[str, Any]:
        return {"checks": [], "rows": [], "facts": {}} | self.data


@dataclass(frozen=True)
class Settings:
    """``work``: where stages write; ``source``: the checkout; ``deadline``: of ``time.monotonic``; ``jobs``: stages
    side by side, in groups that do not measure; ``interpreter``: the command that runs a stage."""

    work: Path
    source: Path
    device: str
    seed: int
    deadline: float
    jobs: int
    interpreter: Sequence[str] = (sys.executable, "-W", "ignore", "-m", "m4ov_bench.gpu.stage")

    @property
    def dry(self) -> bool:
        return self.device == "cpu"


def run(settings: Settings, report: Callable[[list[Outcome]], None]) -> list[Outcome]:
    """All stages; ``report`` gets what there is so far, after every stage. An interruption ends the run: stages that
    are under way are cut off, the others not started."""
    outcomes: list[Outcome] = []

    def add(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(f"{outcome.stage.name}: {outcome.status} in {outcome.seconds:.1f} s {outcome.problem[:300]}", flush=True)
        report(outcomes)

    with _interruptible() as interrupted:
        _run_group([MACHINE], settings, interrupted, add)
        operators = outcomes[0].part["facts"].get("operators")
        if not operators:  # nothing can be planned; say so, instead of ending as if all were well
            return outcomes
        stages = plan(operators)
        # A dry run's figures mean nothing, so nothing needs the machine for itself.
        groups = [0] if settings.dry else sorted({stage.group for stage in stages})
        for group in groups:
            chosen = stages if settings.dry else [stage for stage in stages if stage.group == group]
            _run_group(chosen, settings, interrupted, add)
    return outcomes


def verdict(outcomes: Sequence[Outcome]) -> str:
    """``failed`` if anything is red or crashed, else ``cut off`` if anything was, else ``passed``."""
    found = {outcome.status for outcome in outcomes}
    if found & {FAILED, CRASHED} or len(outcomes) < 2:
        return FAILED
    return CUT_OFF if CUT_OFF in found else PASSED


@dataclass
class _Running:
    stage: Stage
    process: subprocess.Popen[bytes]
    begun: float
    limit: float
    part: Path
    log: Path


def _run_group(
    stages: Sequence[Stage], settings: Settings, interrupted: Callable[[], bool], add: Callable[[Outcome], None]
) -> None:
    waiting, running = list(stages), list[_Running]()
    while waiting or running:
        while waiting and len(running) < settings.jobs:
            stage = waiting.pop(0)
            left = settings.deadline - time.monotonic()
            if interrupted() or left < _LEAST:
                add(
                    Outcome(
                        stage, CUT_OFF, problem="not started: " + ("interrupted" if interrupted() else "no time left")
                    )
                )
            else:
                limit = stage.limit * (3 if settings.dry else 1)  # interpreted, and beside whatever else runs
                running.append(_start(stage, min(limit, left), settings))
        for one in list(running):
            late = time.monotonic() - one.begun > one.limit or interrupted()
            if one.process.poll() is not None or late:
                add(_end(one, late and one.process.poll() is None))
                running.remove(one)
        time.sleep(_POLL if running else 0)


def _start(stage: Stage, limit: float, settings: Settings) -> _Running:
    name = stage.name.replace(":", "-")
    part, log = settings.work / f"{name}.json", settings.work / f"{name}.log"
    for old in (part, log):
        old.unlink(missing_ok=True)
    command = [*settings.interpreter, stage.module, "--operator", stage.operator, "--part", str(part)]
    command += ["--source", str(settings.source), "--device", settings.device, "--seed", str(settings.seed)]
    environment = dict(os.environ)
    environment.pop("M4OV_BACKEND", None)  # the stages choose
    if stage.module in ("numerics", "properties"):
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic mode asks for it
    if settings.dry:
        command.append("--tiny")
        # One thread each: stages run side by side, and waiting threads would spin.
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    else:
        environment.pop("TRITON_INTERPRET", None)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=settings.work,  # not the checkout, whose packages would hide the installed ones
            env=environment,
            start_new_session=True,
        )
    return _Running(stage, process, time.monotonic(), limit, part, log)


def _end(one: _Running, late: bool) -> Outcome:
    seconds = time.monotonic() - one.begun
    if late:
        os.killpg(one.process.pid, signal.SIGKILL)
    code = one.process.wait()
    try:
        data = json.loads(one.part.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = {}
    tail = one.log.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
    checks = data.get("checks", [])
    red = [check for check in checks if check["status"] == FAILED]
    if late:
        return Outcome(one.stage, CUT_OFF, seconds, f"after {seconds:.0f} s", tail, data)
    if code != 0 or not data.get("complete"):
        last = (tail.strip().splitlines() or ["it printed nothing"])[-1]
        return Outcome(one.stage, CRASHED, seconds, f"exit status {code}: {last}", tail, data)
    if red:
        return Outcome(one.stage, FAILED, seconds, f"{len(red)} red, first: {red[0]['problem']}", tail, data)
    judged = [check for check in checks if check["status"] == PASSED]
    if checks and not judged:
        return Outcome(one.stage, NOT_RUN, seconds, checks[0]["problem"], data=data)
    return Outcome(one.stage, PASSED, seconds, data=data)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM end the run in good order: whoever cuts it off still finds the results."""
    seen: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        seen.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

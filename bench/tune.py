"""``m4ov kernels tune``: measures configurations on the GPU of this machine and writes its architecture's table.

A candidate is timed only after its results were judged right, into outputs full of NaN. What is in force stays unless
another is faster by more than noise. Where the minutes end before a (kernel, dtype, width) had its turn, it keeps what
is in force.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from m4ov_bench import gate, machine
from m4ov_bench.tunables import GPU, TUNABLES, Problem, Size, Tunable
from m4ov_kernels import configs, gpu
from m4ov_kernels.configs import Row, Table
from m4ov_kernels.gpu import Config
from m4ov_kernels.lockfile.targets import TARGETS

MARGIN = 0.02  # a configuration that wins by less than this share wins by noise

Timer = Callable[[Callable[[], object]], float]  # seconds of one call


@dataclass(frozen=True)
class Slot:
    """One row of a table, to be searched for."""

    tunable: Tunable
    dtype: torch.dtype
    width: int | None

    def row(self, config: Config) -> Row:
        return Row(self.tunable.kernel, gpu.DTYPES[self.dtype], self.width, config)

    def __str__(self) -> str:
        return f"{self.tunable.kernel} {gpu.DTYPES[self.dtype]} {'any width' if self.width is None else self.width}"


@dataclass(frozen=True)
class Outcome:
    """``seconds``: of each candidate that was right, first the one in force; ``rejected``: why the others were not
    timed; ``best``: what to ship; ``untried``: candidates that the time did not reach."""

    seconds: Mapping[str, float]
    rejected: Mapping[str, str]
    best: Config
    untried: int


def search(slot: Slot, held: Config, device: torch.device, timer: Timer, size: Size, deadline: float) -> Outcome:
    """Gate and time the candidates until ``deadline`` (of ``time.monotonic``), ``held`` (in force) first and always.
    Raises ``RuntimeError`` where ``held`` itself is wrong: that is a bug, not a slow configuration."""
    problem = slot.tunable.problem(size.wide if slot.width is None else slot.width, slot.dtype, device, size)
    candidates = {describe(config): config for config in (held, *slot.tunable.candidates(slot.width))}
    seconds: dict[str, float] = {}
    rejected: dict[str, str] = {}
    for name, config in candidates.items():
        if seconds and time.monotonic() > deadline:
            break
        with configs.override(slot.row(config)):
            reason = _wrong(problem)
            if not reason:
                seconds[name] = timer(problem.call)
            elif config == held:
                raise RuntimeError(f"{slot}: the configuration in force ({name}) is wrong: {reason}")
            else:
                rejected[name] = reason
    in_force = next(iter(candidates))
    fastest = min(seconds, key=lambda name: seconds[name])
    wins = seconds[fastest] < (1 - MARGIN) * seconds[in_force]
    untried = len(candidates) - len(seconds) - len(rejected)
    return Outcome(seconds, rejected, candidates[fastest if wins else in_force], untried)


def _wrong(problem: Problem) -> str:
    """Why the configuration in force now may not be timed; empty: it is right."""
    try:
        problem.prepare()
        problem.call()
        results = [result.clone() for result in problem.results()]
    except Exception as error:  # too much shared memory, a compiler's limit: this candidate is out, whatever it was
        return f"{type(error).__name__}: {error}"
    return gate.compare_all(problem.names, results, problem.plain, problem.exact).problem


def describe(config: Config) -> str:
    blocks = " ".join(f"{name}={size}" for name, size in config.constexprs.items())
    return f"{blocks} warps={config.num_warps} stages={config.num_stages}"


def slots(kernels: Sequence[str], architecture: str) -> list[Slot]:
    """Every row in force, bfloat16 first; raises ``ValueError`` for a kernel that is not tuned."""
    known = [tunable.kernel for tunable in TUNABLES]
    for kernel in kernels:
        if kernel not in known:
            raise ValueError(f"kernel: expected one of {', '.join(known)}; got {kernel!r}")
    return [
        Slot(tunable, dtype, row.width)
        for dtype, name in gpu.DTYPES.items()
        for tunable in TUNABLES
        if not kernels or tunable.kernel in kernels
        for row in configs.rows_of(tunable.kernel, architecture, name)
    ]


def merged(old: Table, found: Mapping[Slot, Config], architecture: str, measured: str) -> Table:
    """The table with what was found: all widths of a (kernel, dtype) stand together, so the others are what is in
    force. ``measured``: on what and when."""
    touched = {(slot.tunable.kernel, gpu.DTYPES[slot.dtype]) for slot in found}
    best = {(slot.tunable.kernel, gpu.DTYPES[slot.dtype], slot.width): config for slot, config in found.items()}
    rows = [row for row in old.rows if (row.kernel, row.dtype) not in touched]
    for kernel, dtype in sorted(touched):
        rows += [
            Row(kernel, dtype, row.width, best.get((kernel, dtype, row.width), row.config))
            for row in configs.rows_of(kernel, architecture, dtype)
        ]
    rows.sort(key=lambda row: (row.kernel, row.dtype, float("inf") if row.width is None else row.width))
    return Table({**old.measured, **{kernel: measured for kernel, _ in touched}}, tuple(rows))


def run(kernels: Sequence[str], device: torch.device, timer: Timer, size: Size, seconds: float, folder: Path) -> Path:
    """Search every slot in its share of ``seconds``, print a line for each, write ``folder/<architecture>.json``."""
    architecture = gpu.architecture(device)
    waiting = slots(kernels, architecture)
    end = time.monotonic() + seconds
    found: dict[Slot, Config] = {}
    for i, slot in enumerate(waiting):
        now = time.monotonic()
        if now >= end:
            print(f"the time is up: {len(waiting) - i} rows keep what they have")
            break
        rows = configs.rows_of(slot.tunable.kernel, architecture, gpu.DTYPES[slot.dtype])
        held = next(row.config for row in rows if row.width == slot.width)
        outcome = search(slot, held, device, timer, size, now + (end - now) / (len(waiting) - i))
        found[slot] = outcome.best
        before, after = outcome.seconds[describe(held)], outcome.seconds[describe(outcome.best)]
        counts = f"{len(outcome.seconds)} timed, {len(outcome.rejected)} rejected, {outcome.untried} not tried"
        print(f"{slot}: {before * 1e6:.1f} → {after * 1e6:.1f} µs with {describe(outcome.best)} ({counts})", flush=True)
        for name, reason in outcome.rejected.items():
            print(f"  rejected {name}: {' '.join(reason.split())[:160]}")
    path = folder / f"{architecture}.json"
    old = configs.read(path) if path.exists() else Table({}, ())
    configs.write(path, merged(old, found, architecture, _measured_on(device)))
    configs.forget()
    return path


def command(kernels: Sequence[str], minutes: float) -> int:
    """Exit status 2 where there is no GPU to measure on."""
    if not torch.cuda.is_available():
        print("m4ov kernels tune: PyTorch sees no GPU; it measures on one, and writes nothing here", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    path = run(kernels, device, _on_gpu, GPU, 60 * minutes, configs.FOLDER)
    print(f"{path}\nNow lock what this changes: m4ov kernels lock")
    if path.stem not in TARGETS:
        print(f"{path.stem} is not among the architectures that the lock compiles for; ship this table only with it")
    return 0


def _on_gpu(call: Callable[[], object]) -> float:
    """Median of 50 ms of calls, with the L2 cache emptied before each."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=50, return_mode="median")) * 1e-3


def _measured_on(device: torch.device) -> str:
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, interpreted"
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    date = datetime.now(timezone.utc).date().isoformat()
    return ", ".join(filter(None, (name, _driver(), versions, machine.describe().commit, date)))


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        version = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"driver {version[0]}" if version else ""

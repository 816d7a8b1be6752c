"""Judges everything that is declared. Where a compilation's key (a hash of all that it depends on) is the lock's, the
lock's report of it stands; the rest is compiled in parallel, or taken from a cache."""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m4ov_kernels.gpu import FP_FUSION, Build, CudaBuild
from m4ov_kernels.lockfile import compile as compilers
from m4ov_kernels.lockfile.families import CSRC, Declared
from m4ov_kernels.lockfile.report import Report, violations
from m4ov_kernels.lockfile.targets import CUDA_TARGETS, STATIC_SHARED, TARGETS

_WORTH_A_PROCESS = 16
_COMPILED_ANYWAY = 20  # one in so many of those that the lock knows
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)

Held = Mapping[str, list[Report]]  # by key


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel, what it was declared to be, and the key of its compilation."""

    report: Report
    build: Build | CudaBuild
    violations: list[str]
    key: str


@dataclass(frozen=True)
class Found:
    """What one compiler made; ``errors``: what is wrong and is no kernel's; ``held``: how many compilations the lock
    answered for."""

    kernels: list[Kernel] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    held: int = 0

    @property
    def failures(self) -> list[str]:
        broken = [f"{k.report.kernel} on {k.report.target}: {text}" for k in self.kernels for text in k.violations]
        return self.errors + broken


@dataclass(frozen=True)
class _Job:
    function: Callable[..., list[Report]]
    arguments: tuple[Any, ...]
    key: str  # whatever the result depends on


def triton_kernels(declared: Declared, targets: Iterable[str], cache: Path | None, held: Held) -> Found:
    """Every declared Triton kernel on every target that it ships for."""
    wanted = [(*entry, target) for entry in declared.builds for target in targets if target in entry[2].targets]
    jobs = [
        _Job(compilers.compile_triton, (module, index, target), _triton_key(build, target))
        for module, index, build, target in wanted
    ]
    found = Found(held=sum(job.key in held for job in jobs))
    for (_, _, build, target), job, (report,) in zip(wanted, jobs, _run(jobs, cache, held), strict=True):
        broken = violations(report, build, TARGETS[target].shared_block)
        found.kernels.append(Kernel(report, build, broken, job.key))
    return found


def cuda_kernels(declared: Declared, targets: Iterable[str], cache: Path | None, held: Held, version: str) -> Found:
    """Every kernel of every ``.cu`` file, held to what its family declares."""
    jobs_of = {
        folder: [
            _Job(compilers.compile_cuda, (file, target), _cuda_key(file, target, version))
            for file in sorted(folder.glob("*.cu"))
            for target in targets
        ]
        for folder in declared.cuda
    }
    found = Found(held=sum(job.key in held for jobs in jobs_of.values() for job in jobs))
    for folder, builds in declared.cuda.items():
        jobs = jobs_of[folder]
        seen: set[str] = set()
        made = zip(jobs, _run(jobs, cache, held), strict=True)
        for key, report in ((job.key, report) for job, reports in made for report in reports):
            build = next((b for b in builds if fnmatch.fnmatchcase(report.kernel, b.pattern)), None)
            if build is None:
                found.errors.append(f"csrc/{folder.name}: {report.kernel} is in no CudaBuild of KERNELS")
                continue
            seen.add(build.pattern)
            found.kernels.append(Kernel(report, build, violations(report, build, STATIC_SHARED), key))
        if jobs:
            missing = [build.pattern for build in builds if build.pattern not in seen]
            found.errors.extend(f"csrc/{folder.name}: no kernel is named {pattern}" for pattern in missing)
    found.errors[:] = sorted(set(found.errors))
    return found


def cuda_targets(targets: Sequence[str] | None) -> list[str]:
    """nvcc's targets for the chips of ``targets`` (Triton's names; ``None``: all)."""
    return [name for name in CUDA_TARGETS if targets is None or name.rstrip("af") in targets]


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m4ov" / "lockfile"


def all_but_a_sample(held: Held) -> Held:
    """Without one in ``_COMPILED_ANYWAY``, drawn anew each time: a lock that does not tell the truth does not last."""
    dropped = set(random.sample(sorted(held), -(-len(held) // _COMPILED_ANYWAY)))
    return {key: reports for key, reports in held.items() if key not in dropped}


def _run(jobs: Sequence[_Job], cache: Path | None, held: Held) -> list[list[Report]]:
    """The reports of every job, in order; what neither the lock nor the cache has is compiled on every core that this
    process may use."""
    paths = [cache / f"{job.key}.json" if cache else None for job in jobs]
    results = [held[job.key] if job.key in held else _load(path) for job, path in zip(jobs, paths, strict=True)]
    missing = [i for i, reports in enumerate(results) if reports is None]
    if missing:
        with _pool([jobs[i] for i in missing]) as pool:
            futures: dict[int, Future[list[Report]]] = {
                i: pool.submit(jobs[i].function, *jobs[i].arguments) for i in missing
            }
            for i, future in futures.items():
                results[i] = future.result()
                _store(paths[i], future.result())
    return [reports for reports in results if reports is not None]


def _pool(jobs: Sequence[_Job]) -> Executor:
    """nvcc is a process by itself. One that compiles with Triton must import it first, which takes as long as
    ``_WORTH_A_PROCESS`` compilations do: few are made here."""
    cores = len(os.sched_getaffinity(0))
    if all(job.function is compilers.compile_cuda for job in jobs):
        return ThreadPoolExecutor(min(len(jobs), cores))
    workers = min(cores, -(-len(jobs) // _WORTH_A_PROCESS))
    if workers == 1:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _load(path: Path | None) -> list[Report] | None:
    if path is None or not path.exists():
        return None
    return [Report(**entry) for entry in json.loads(path.read_text())]


def _store(path: Path | None, reports: list[Report]) -> None:
    """Whole or not at all: several checks may run at once."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump([report.as_json() for report in reports], file)
        os.replace(file.name, path)


def _triton_key(build: Build, target: str) -> str:
    module = importlib.import_module(build.kernel.__module__)
    # Triton's own switches (another ptxas, a debug mode) change what it makes.
    switches = sorted(
        (name, value) for name, value in os.environ.items() if name.startswith("TRITON_") and "CACHE" not in name
    )
    facts = (build.name, compilers.source(build).hash(), target, build.num_warps, build.num_stages, FP_FUSION)
    return _key(module.__name__, *facts, compilers.triton_version(), switches)


def _cuda_key(file: Path, target: str, version: str) -> str:
    """The file and every header of ours that it includes, themselves or through another."""
    reached: dict[Path, bytes] = {}
    waiting = [file]
    while waiting:
        path = waiting.pop()
        if path not in reached:
            reached[path] = path.read_bytes()
            names = _INCLUDE.findall(reached[path].decode())
            beside = [(path.parent / name, CSRC / name) for name in names]
            waiting += [next(found for found in places if found.exists()) for places in beside]
    contents = _digest(reached[path] for path in sorted(reached))
    return _key(file.name, target, version, tuple(compilers.NVCC_FLAGS), contents)


def _key(*facts: Any) -> str:
    """The code that compiles and reads is one of the facts: a change of it makes old reports void."""
    folder = Path(__file__).parent
    readers = _digest((folder / f"{name}.py").read_bytes() for name in ("compile", "read", "report", "targets"))
    return hashlib.sha256(repr((*facts, readers)).encode()).hexdigest()[:32]


def _digest(contents: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()

"""Timers. What is compared runs interleaved, round by round, and the ratio is the median over rounds.

The speed of memory drifts from second to second on shared machines, so a limit that was measured a minute ago is no
limit. Within a round everything sees the same machine; inputs rotate, so that caches do not flatter.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from m4ov_kernels.dispatch import native_extension

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

_ENOUGH, _SHORT = 5, 0.1  # rounds, seconds
_DOT_OPERATIONS = 4e8
Call = Callable[[int], object]  # takes a running number, for rotating inputs; its result is freed inside the timing


@dataclass(frozen=True)
class Sample:
    """One timed call: its seconds, its page faults, and whether the system took the processor away during it."""

    seconds: float
    faults: int
    disturbed: bool


@dataclass(frozen=True)
class Times:
    """The samples of one candidate, per round (``None`` where it sat the round out).

    Statistics are over undisturbed samples where there are at least ``_ENOUGH``: another process on our cores says
    nothing about the operator. ``disturbed`` tells how many of them there were.
    """

    rounds: tuple[Sample | None, ...]

    @property
    def seconds(self) -> float:
        return statistics.median(sample.seconds for (sample,) in _common(self))

    @property
    def faults(self) -> float | None:
        return statistics.median(sample.faults for (sample,) in _common(self)) if resource else None

    @property
    def disturbed(self) -> float | None:
        taken = [sample for sample in self.rounds if sample is not None]
        return sum(sample.disturbed for sample in taken) / len(taken) if resource else None

    def ratio_to(self, other: Times) -> float:
        """Median over common rounds of this time over the other's."""
        return statistics.median(a.seconds / b.seconds for a, b in _common(self, other))

    def less(self, other: Times) -> float:
        """Median over common rounds of the seconds by which this is longer than the other."""
        return statistics.median(a.seconds - b.seconds for a, b in _common(self, other))


def _common(*times: Times) -> list[tuple[Sample, ...]]:
    """The samples of rounds in which all ran, undisturbed where that leaves enough."""
    together = zip(*(t.rounds for t in times), strict=True)
    ran = [tuple(sample for sample in samples if sample is not None) for samples in together]
    ran = [samples for samples in ran if len(samples) == len(times)]
    calm = [samples for samples in ran if not any(sample.disturbed for sample in samples)]
    return calm if len(calm) >= _ENOUGH else ran


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds per group of candidates, and per candidate within it, and the fewest rounds."""

    seconds: float = 6.0
    each: float = 2.5
    fewest: int = 5
    most: int = 60


FULL, QUICK = Effort(), Effort(seconds=1.2, each=0.6, fewest=3, most=25)


def interleaved(candidates: Mapping[str, Call], effort: Effort) -> dict[str, Times]:
    """Time candidates round by round; a slow one sits rounds out, but runs in at least ``effort.fewest``, or in two if
    so many would alone take longer than all are to take (a peer of seconds a call)."""
    estimate = {}
    for name, call in candidates.items():
        call(0)  # warm-up: compiles, maps, packs
        estimate[name] = max(min(_timed(call, 1).seconds, _timed(call, 2).seconds), 1e-7)
    fewest = {n: effort.fewest if effort.fewest * s <= effort.seconds else 2 for n, s in estimate.items()}
    runs = {n: max(fewest[n], min(effort.most, int(effort.each / seconds))) for n, seconds in estimate.items()}
    total = sum(runs[name] * seconds for name, seconds in estimate.items())
    if total > effort.seconds:
        runs = {name: max(fewest[name], int(count * effort.seconds / total)) for name, count in runs.items()}
    rounds = max(runs.values())
    stride = {name: max(1, rounds // count) for name, count in runs.items()}
    samples: dict[str, list[Sample | None]] = {name: [] for name in candidates}
    names, index, calm = list(candidates), 0, 0
    number = itertools.count()  # of every call, so that no call finds what the one before it left in the caches
    # A long call is always disturbed a little, and a little of a long call is nothing: only short ones are repeated.
    deadline = time.perf_counter() + (3 * effort.seconds if sum(estimate.values()) < _SHORT else 0)
    with _no_collection():
        # On a busy machine go on until enough rounds were left alone, within reason.
        while index < rounds or (calm < _ENOUGH < rounds and time.perf_counter() < deadline):
            ran = []
            for name in names[index % len(names) :] + names[: index % len(names)]:
                due = index % stride[name] == 0
                samples[name].append(_timed(candidates[name], next(number)) if due else None)
                ran.append(samples[name][-1])
            calm += all(sample is not None and not sample.disturbed for sample in ran)
            index += 1
    return {name: Times(tuple(values)) for name, values in samples.items()}


def microseconds(calls: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, Times]:
    """Seconds per call of very short calls, each timed in loops of about a millisecond, interleaved."""
    loops = {}
    for name, call in calls.items():
        call()
        seconds = _timed(_looped(call, 50), 0).seconds
        loops[name] = max(10, int(50 * 1e-3 / max(seconds, 1e-9)))
    timed = interleaved({name: _looped(call, loops[name]) for name, call in calls.items()}, effort)
    return {
        name: Times(tuple(s and Sample(s.seconds / loops[name], s.faults, s.disturbed) for s in times.rounds))
        for name, times in timed.items()
    }


def _looped(call: Callable[[], object], count: int) -> Call:
    def loop(_: int) -> None:
        for _ in range(count):
            call()

    return loop


def copy_rate(size: int, effort: Effort) -> float:
    """B/s (read plus written) of a copy of ``size`` bytes, over rotating buffers."""
    sources = [torch.ones(size // 8, dtype=torch.float64) for _ in range(3)]
    sinks = [torch.zeros_like(source) for source in sources]
    times = interleaved({"copy": lambda index: sinks[index % 3].copy_(sources[index % 3])}, effort)["copy"]
    return 2 * size / times.seconds


def matmul_rate(dtype: torch.dtype, effort: Effort, size: int) -> float:
    """FLOP/s of a large square ``torch.mm``: the arithmetic's limit."""
    left, right, out = (torch.randn(size, size).to(dtype) for _ in range(3))
    times = interleaved({"mm": lambda _: torch.mm(left, right, out=out)}, effort)["mm"]
    return 2 * size**3 / min(sample.seconds for sample in times.rounds if sample is not None)


def dot_rate(kind: str, effort: Effort) -> float:
    """Operations a second of dot products in registers alone, ``kind`` int8 or bf16, on PyTorch's number of threads:
    what the instruction set can do. The compiled kernels must be there."""
    call, made = dot_products(kind, _DOT_OPERATIONS)
    return made / min(sample.seconds for sample in interleaved({"dot": call}, effort)["dot"].rounds if sample)


def dot_products(kind: str, operations: float) -> tuple[Call, int]:
    """A call that makes about so many, and how many it makes."""
    extension, reason = native_extension()
    if extension is None:
        raise RuntimeError(reason)
    team = torch.get_num_threads()
    each = extension.dot_loop(kind, 1, team)
    steps = max(1, int(operations / each))
    return lambda _: extension.dot_loop(kind, steps, team), steps * each


def release() -> None:
    """Give free memory back to the system, which an allocator that is set up keeps: pieces of it, into which nothing
    large fits any more, pile up from case to case."""
    gc.collect()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def _timed(call: Call, index: int) -> Sample:
    faults, switches = usage()
    start = time.perf_counter()
    call(index)
    seconds = time.perf_counter() - start
    faults_after, switches_after = usage()
    return Sample(seconds, faults_after - faults, switches_after > switches)


def usage() -> tuple[int, int]:
    """(page faults, involuntary context switches) of this process."""
    if resource is None:
        return 0, 0
    found = resource.getrusage(resource.RUSAGE_SELF)
    return found.ru_minflt, found.ru_nivcsw


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

"""Timing by CUDA events: rounds in which all candidates run, batches of calls that the host queues ahead.

What is measured is the time on the device: while a short wait (``torch.cuda._sleep``) holds the stream, the host queues
a batch of calls behind it, so that launch gaps count only where a call makes the host wait or the host is slower than
the device in spite of its lead. Inputs rotate from call to call. On the CPU the same rounds run with the host's clock.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import partial

import torch

from m4ov_bench.gpu import device as chip
from m4ov_bench.measure import Call, Effort, Sample, Times

_ROUND = 2e-3  # seconds that a batch should last, so that the resolution of events (0.5 µs) is nothing
_MOST = 20  # calls in a batch: the device's launch queue holds about a thousand kernels
_LONGEST_LEAD = 0.05  # seconds

EFFORT = Effort(seconds=3.0, each=0.4, fewest=5, most=40)
TINY_EFFORT = Effort(seconds=0.02, each=0.005, fewest=2, most=3)


def interleaved(device: torch.device, candidates: Mapping[str, Call], effort: Effort) -> dict[str, Times]:
    """As :func:`m4ov_bench.measure.interleaved`: samples of each candidate, round by round; seconds per call."""
    numbers = itertools.count()
    batches, leads, estimates = {}, {}, {}
    for name, call in candidates.items():
        for _ in range(3):  # compiles, chooses algorithms, allocates
            call(next(numbers))
        estimates[name] = max(_batch(device, call, numbers, 3, 0.0), 1e-7)
        batches[name] = max(1, min(_MOST, int(_ROUND / estimates[name])))
        leads[name] = min(
            _LONGEST_LEAD, 1.5 * batches[name] * chip.seconds_to_queue(device, lambda c=call: c(next(numbers)))
        )
    once = sum(estimates[name] * batches[name] + leads[name] for name in candidates)
    rounds = max(effort.fewest, min(effort.most, int(effort.seconds / once)))
    samples: dict[str, list[Sample | None]] = {name: [] for name in candidates}
    names = list(candidates)
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            seconds = _batch(device, candidates[name], numbers, batches[name], leads[name])
            samples[name].append(Sample(seconds, 0, False))
    return {name: Times(tuple(values)) for name, values in samples.items()}


def timer(device: torch.device) -> partial[dict[str, Times]]:
    return partial(interleaved, device)


def _batch(device: torch.device, call: Call, numbers: Iterator[int], count: int, lead: float) -> float:
    """Seconds of one of ``count`` calls in a row."""

    def run() -> None:
        for _ in range(count):
            call(next(numbers))

    return chip.seconds_of(device, run, lead) / count

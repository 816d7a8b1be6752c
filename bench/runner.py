"""Runs families of benchmarks. A family is a module with ``benchmark(session) -> Iterator[Row]``."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from m4ov_bench import machine, measure
from m4ov_bench.row import Row
from m4ov_bench.session import Session

FAMILIES = ("norm", "activation", "head", "dispatch", "step")
QUICK_FAMILIES = ("norm", "activation", "head", "dispatch")


def stream(
    families: Sequence[str] | None = None,
    quick: bool = False,
    say: Callable[[str], None] = lambda _: None,
    allocator: str = "",
) -> Iterator[Row]:
    """The rows of :func:`run`, each as soon as it is measured. ``say`` hears what is being done."""
    chosen = tuple(families or (QUICK_FAMILIES if quick else FAMILIES))
    unknown = [name for name in chosen if name not in FAMILIES]
    if unknown:
        raise ValueError(f"no benchmark is named {unknown[0]!r}; there are {', '.join(FAMILIES)}")
    say("measuring the machine's limits")
    here = machine.describe(allocator)
    session = Session(replace(here, limits=machine.limits(measure.QUICK)), quick, say)
    seed = int.from_bytes(os.urandom(4), "little")  # fresh values in every run
    torch.manual_seed(seed)
    say(f"seed {seed}")
    for family in chosen:
        yield from importlib.import_module(f"m4ov_bench.{family}").benchmark(session)


def run(
    families: Sequence[str] | None = None,
    quick: bool = False,
    say: Callable[[str], None] = lambda _: None,
    allocator: str = "",
) -> list[Row]:
    """Measure on the CPU, in bfloat16 unless a case says otherwise.

    Args:
        families: some of ``FAMILIES``; all of them by default.
        quick: the short run, under a minute: the main case of each operator, without compiled peers, without the
            memory of the head and without the training step.
        say: called with a line of text at every stage.
        allocator: how the allocator is set up, in words, for the record.

    Returns:
        One row for each measurement. A row with ``green=False`` failed the numerics rule and carries no speed.
    """
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as if nothing had happened
        return list(stream(families, quick, say, allocator))

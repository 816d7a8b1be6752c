"""Runs families of benchmarks. A family is a module with ``benchmark(session) -> Iterator[Row]``.

Imported by the command line before torch may be, so torch is imported where it is used.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from m4ov_bench.row import Row

if TYPE_CHECKING:
    from m4ov_bench.measure import Effort

_OPERATORS = ("norm", "activation", "attention", "rope", "packing", "head", "gemm", "moe", "vision", "dispatch")
FAMILIES = (*_OPERATORS, "step", "sft", "generate", "rl")
QUICK_FAMILIES = (*_OPERATORS, "sft")


def check(families: Sequence[str] | None) -> None:
    """Raises ``ValueError``, listing the families, if one is unknown."""
    unknown = [name for name in families or () if name not in FAMILIES]
    if unknown:
        raise ValueError(f"no benchmark is named {unknown[0]!r}; there are {', '.join(FAMILIES)}")


def stream(
    families: Sequence[str] | None = None,
    quick: bool = False,
    say: Callable[[str], None] = lambda _: None,
    allocator: str = "",
    only: str = "",
    seed: int | None = None,
    in_processes: bool = False,
    effort: Effort | None = None,
) -> Iterator[Row]:
    """The rows of :func:`run`, each as soon as it is measured; ``only``: of the cases whose name holds it;
    ``in_processes``: each family in one of its own. Leaves the generator seeded."""
    import torch

    from m4ov_bench import apart, machine, measure
    from m4ov_bench.session import Session

    check(families)
    say("measuring the machine's limits")
    here = replace(machine.describe(allocator), limits=machine.limits(effort or measure.QUICK))
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(seed)
    session = Session(replace(here, seed=seed), quick, say, given_effort=effort, only=only)
    for family in families or (QUICK_FAMILIES if quick else FAMILIES):
        if in_processes:
            yield from apart.rows(family, session)
        else:
            yield from importlib.import_module(f"m4ov_bench.{family}").benchmark(session)


def run(
    families: Sequence[str] | None = None,
    quick: bool = False,
    say: Callable[[str], None] = lambda _: None,
    allocator: str = "",
    seed: int | None = None,
    only: str = "",
    effort: Effort | None = None,
) -> list[Row]:
    """Measure on the CPU, in bfloat16 unless a case says otherwise.

    Args:
        families: some of ``FAMILIES``; all of them by default.
        quick: the short run, under a minute: the main case of each operator, without compiled peers, without the
            memory of the head and without the step of a patched model.
        say: called with a line of text at every stage.
        allocator: how the allocator is set up, in words, for the record.
        seed: of the values; fresh ones by default. Every row's ``machine`` names it.
        only: a part of the names of the cases to measure, main ones or not.
        effort: how long to measure, instead of what ``quick`` says.

    Returns:
        One row for each measurement. A row with ``green=False`` failed the numerics rule and carries no speed.

    Raises:
        ValueError: a family is unknown; lists them.
    """
    import torch

    with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as if nothing had happened
        return list(stream(families, quick, say, allocator, only, seed, effort=effort))

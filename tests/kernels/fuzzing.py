"""One call of the fuzzer: everything about it follows from a seed and an index."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch

from m4ov_kernels.dispatch import FUNCTIONS, native_extension

from .draws import Seeded
from .guarded import guarded
from .operators import CASES, OperatorCase

_NAMES = [name for name in sorted(CASES) for _ in range(CASES[name].share)]
JUDGED = 16  # one call in so many is compared with float64
GUARDED = 4  # one call in so many runs twice, the second time into guarded outputs and with other threads
THREADS = (1,) * 12 + (2,) * 4 + (3, 8)


class Outcome(NamedTuple):
    operator: str
    dtype: str
    isa: str
    kind: str  # "forward", "backward" (after a forward), "refused"
    judged: bool = False
    guarded: bool = False


class FuzzError(AssertionError):
    """What was called, and what came of it."""


@cache
def isas() -> tuple[str, ...]:
    return tuple(native_extension()[0].isas())


def fuzz(seed: int, index: int) -> Outcome:
    """Draw one call and make it.

    Raises:
        FuzzError: a wrong result, an error that the arguments do not deserve, or none where they do.
    """
    draw = Seeded(seed, index)
    case, isa = CASES[draw.choice(_NAMES)], draw.choice(isas())
    native_extension()[0].set_isa(isa)
    torch.set_num_threads(draw.choice(THREADS))
    wrong, judged, twice = draw.one_in(8), draw.one_in(JUDGED), draw.one_in(GUARDED)
    where = f"{case.name} on {isa} with {torch.get_num_threads()} threads"
    if wrong:
        arguments, fault = case.arguments(draw), draw.choice(case.corruptions)
        while True:  # until the fault is one that this call can have
            try:
                if case.refuse(arguments, fault, draw):
                    return Outcome(case.name, _dtype(case, arguments), isa, "refused")
            except Exception as error:
                raise FuzzError(f"{where}, {fault}: {type(error).__name__}: {error}") from error
            fault = draw.choice(case.corruptions)
    call = case.call(draw)
    shift, threads = draw.integer(0, 3), draw.choice(THREADS)
    try:
        with case.settings(draw, call.arguments):
            with guarded(FUNCTIONS[case.name], shift, threads, case.bitwise) if twice else nullcontext():
                got = case.evaluate(call)
            if judged:
                case.judge(call, got)
    except Exception as error:
        raise FuzzError(f"{where}, {call}: {type(error).__name__}: {error}") from error
    kind = "backward" if call.wanted else "forward"
    return Outcome(case.name, _dtype(case, call.arguments), isa, kind, judged, twice)


def _dtype(case: OperatorCase, arguments: dict[str, Any]) -> str:
    return str(case.kernel_dtype(arguments) or "reference").removeprefix("torch.")

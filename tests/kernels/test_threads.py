"""Calls from 8 Python threads at once: every operator, forward and backward, with a number of OpenMP threads and a
backend of each thread's own. Each call must give the bits that it gives alone, and none may wait for ever."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import m4ov_kernels

from .conftest import SEED
from .draws import Seeded
from .guarded import check_bits
from .operators import CASES, Call, OperatorCase

PYTHON_THREADS = 8
OPENMP_THREADS = (1, 2, 3, 4)
BACKENDS = ("native", "native", "reference")
LARGE = 64 << 10  # bytes from which the kernels share their work among threads
SECONDS = 300.0  # for all calls together; they take a few


def calls(case: OperatorCase, small: int, large: int) -> list[Call]:
    """Drawn calls, with a backward where there is one, that kernels serve, some large enough for OpenMP threads."""
    found: list[Call] = []
    index = 0
    while small or large:
        index += 1
        call = case.call(Seeded(SEED, index))
        if bool(call.wanted) != bool(case.differentiable) or case.kernel_dtype(call.arguments) is None:
            continue
        size = max(value.nbytes for value in call.arguments.values() if isinstance(value, Tensor))
        if size > 4 << 20 or not (large if size >= LARGE else small):
            continue
        found.append(call)
        large, small = large - (size >= LARGE), small - (size < LARGE)
    return found


def outcome(case: OperatorCase, call: Call, backend: str, threads: int) -> Mapping[str, Tensor]:
    torch.set_num_threads(threads)
    with m4ov_kernels.backend(backend):
        return case.evaluate(call)


def test_calls_from_eight_threads(isa):
    before = torch.get_num_threads()
    work: list[list[tuple[OperatorCase, Call, str, int]]] = []
    drawn = {case: calls(case, small=12, large=4) for case in CASES.values()}
    for i in range(PYTHON_THREADS):
        backend, threads = BACKENDS[i % len(BACKENDS)], OPENMP_THREADS[i % len(OPENMP_THREADS)]
        ordered = [(case, call, backend, threads) for case, some in drawn.items() for call in some]
        work.append(ordered[i:] + ordered[:i])
    try:
        alone = [[outcome(*each) for each in ordered] for ordered in work]
    finally:
        torch.set_num_threads(before)
    failures: list[BaseException] = []
    together = threading.Barrier(PYTHON_THREADS, timeout=SECONDS)

    def run(ordered: list[tuple[OperatorCase, Call, str, int]], expected: list[Mapping[str, Tensor]]) -> None:
        try:
            together.wait()
            for each, results in zip(ordered, expected, strict=True):
                for name, tensor in outcome(*each).items():
                    check_bits(f"{each[0]} {name} by {each[2]} with {each[3]} threads", tensor, results[name])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in zip(work, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        if thread.is_alive():
            pytest.fail("deadlock: a call did not come back")
    assert torch.get_num_threads() == before, "a thread's number of threads is its own"
    if failures:
        raise failures[0]

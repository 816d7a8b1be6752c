"""Families in processes of their own: rows arrive, errors are heard, and one that is killed is a red row."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace

import pytest

from m4ov_bench import apart, machine
from m4ov_bench.session import Session
from m4ov_kernels.dispatch import native_extension

# The family is dispatch: it is short, and without compiled kernels it has no rows.
pytestmark = pytest.mark.skipif(native_extension()[0] is None, reason="needs the compiled kernels")
SEED = int(os.environ["M4OV_TEST_SEED"])


def session(said: list[str], only: str = "") -> Session:
    return Session(replace(machine.describe("as tested"), seed=SEED), quick=True, say=said.append, only=only)


def test_rows_and_words_come_over():
    said: list[str] = []
    rows = list(apart.rows("dispatch", session(said)))
    assert rows
    assert {row.family for row in rows} == {"dispatch"}
    assert all(row.green and row.seconds and row.machine.seed == SEED for row in rows)
    assert said
    assert not multiprocessing.active_children()


def test_a_killed_process_is_a_red_row():
    def kill(text: str) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    (row,) = apart.rows("dispatch", replace(session([]), say=kill))
    assert not row.green
    assert row.family == "dispatch"
    assert "signal 9 (out of memory?)" in row.problem


def test_an_error_is_heard_with_its_place():
    with pytest.raises(RuntimeError, match="bench nowhere: ModuleNotFoundError") as raised:
        list(apart.rows("nowhere", session([])))
    assert "_work" in str(raised.value.__cause__)


def test_rows_that_nobody_wants_end_the_process():
    rows = apart.rows("dispatch", session([]))
    next(rows)
    rows.close()
    assert not multiprocessing.active_children()

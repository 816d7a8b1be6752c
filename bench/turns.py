"""Loops of steps in processes of their own, step about: each has its own peak of memory, and all meet the same machine.

A loop cannot be called step by step, so it is held up between its steps: :class:`Turns`, in its process, tells how long
the last one took and waits until it may go on; :func:`by_turns` says when.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from m4ov_bench import measure


class SideError(RuntimeError):
    """A side's process failed; the message says how."""


class Turns:
    """A loop's end of the pipe. A step is from the word to go on to the next call of :meth:`next`."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._began, self._usage = 0.0, (0, 0)

    def begin(self) -> bool:
        """Before the first step: waits; whether there is to be one."""
        return self._wait(None)

    def next(self) -> bool:
        """After a step: waits; whether there is to be another one."""
        seconds = time.perf_counter() - self._began
        (faults, switches), (faults_before, switches_before) = measure.usage(), self._usage
        return self._wait(measure.Sample(seconds, faults - faults_before, switches > switches_before))

    def _wait(self, sample: measure.Sample | None) -> bool:
        self._pipe.send(("step", sample))
        go_on: bool = self._pipe.recv()
        self._usage, self._began = measure.usage(), time.perf_counter()
        return go_on


class Side:
    """A process, seen from the one that starts it.

    Args:
        loop: ``(turns, *arguments) -> result``, importable by name; calls :meth:`Turns.begin` once, then
            :meth:`Turns.next` after each step, and ends where one of them says so.
    """

    def __init__(self, name: str, loop: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        # Not a daemon: those may not have processes of their own, which a DataLoader's workers are.
        self._process = context.Process(target=_work, args=(there, loop, arguments), name=f"m4ov bench {name}")
        self._process.start()
        there.close()
        self._begun = False

    def step(self) -> measure.Sample:
        """One step.

        Raises:
            SideError: it failed, or the process is gone.
        """
        if not self._begun:
            self._answer()  # ready
            self._begun = True
        self._say(True)
        sample: measure.Sample = self._answer()
        return sample

    def end(self) -> Any:
        """No more steps; what the loop returns.

        Raises:
            SideError: see :meth:`step`.
        """
        self._say(False)
        return self._answer()

    def close(self) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _say(self, go_on: bool) -> None:
        try:
            self._pipe.send(go_on)
        except OSError:
            raise SideError("its process is gone (killed, or out of memory?)") from None

    def _answer(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            raise SideError("its process ended without an answer (killed, or out of memory?)") from None
        if kind == "error":
            raise SideError(value)
        return value


def by_turns(
    sides: Mapping[str, Side], *, warm: int, rounds: int
) -> tuple[dict[str, measure.Times], dict[str, Any], dict[str, str]]:
    """``warm`` steps of each side that do not count, then ``rounds`` that do, in an order that rotates.

    Returns:
        Times and results of the sides that came to the end, and of the others why they did not.
    """
    samples: dict[str, list[measure.Sample]] = {name: [] for name in sides}
    failed: dict[str, str] = {}
    names = list(sides)
    for index in range(warm + rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            if name not in failed:
                try:
                    samples[name].append(sides[name].step())
                except SideError as error:
                    failed[name] = str(error)
    ends = {}
    for name in names:
        if name not in failed:
            try:
                ends[name] = sides[name].end()
            except SideError as error:
                failed[name] = str(error)
    return {name: measure.Times(tuple(samples[name][warm:])) for name in ends}, ends, failed


def _work(pipe: Connection, loop: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        pipe.send(("end", loop(Turns(pipe), *arguments)))
    except (BrokenPipeError, EOFError):
        return  # nobody listens any more
    except Exception as error:
        pipe.send(("error", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"))
    finally:
        pipe.close()

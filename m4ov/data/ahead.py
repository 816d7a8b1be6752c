"""Batches made ahead of the step, by one thread."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

B = TypeVar("B")
B_co = TypeVar("B_co", covariant=True)


class Source(Protocol[B_co]):
    """What the training loop takes batches from (:class:`m4ov.train.Data`)."""

    def batches(self, step: int) -> Sequence[B_co]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class _Made(Generic[B]):
    step: int
    batches: Sequence[B]
    state: dict[str, Any]  # after that step
    error: BaseException | None = None


class Ahead(Generic[B]):
    """The same batches as ``source``'s, at most ``depth`` steps made ahead of the one that is asked for.

    Its state is that after the last step that was taken, whatever has been made since. An error of the source is raised
    by the step that it belongs to, and again by every later one.

    Args:
        source: used by the thread alone from the first step on.
        depth: steps that are made and wait; 1 or more.
        threads: of torch's, in that thread: what it takes from the training.

    Attributes:
        waited, steps: seconds that :meth:`batches` waited, and how often it was called. The first call waits for a
            whole step to be made.
    """

    def __init__(self, source: Source[B], *, depth: int = 2, threads: int = 1) -> None:
        for name, value in (("depth", depth), ("threads", threads)):
            if value < 1:
                raise ValueError(f"Ahead: {name}: expected 1 or more; got {value}")
        self.source, self.depth, self.threads = source, depth, threads
        self.waited, self.steps = 0.0, 0
        self._worker: _Worker[B] | None = None
        self._state: dict[str, Any] | None = None
        self._error: BaseException | None = None

    def batches(self, step: int) -> Sequence[B]:
        """Of the next step.

        Raises:
            ValueError: ``step`` is not the next. Whatever the source raises.
        """
        if self._error is not None:
            raise self._error
        if self._worker is None:
            self._state = self.source.state_dict()
            self._worker = _Worker(self.source, step, self.depth, self.threads)
            weakref.finalize(self, self._worker.stop)
        if step != self._worker.next:
            raise ValueError(f"Ahead: step: expected {self._worker.next}, the next; got {step}")
        began = time.perf_counter()
        made = self._worker.take()
        self.waited, self.steps = self.waited + time.perf_counter() - began, self.steps + 1
        if made.error is not None:
            self._error = made.error
            raise made.error
        self._state = made.state
        return made.batches

    def state_dict(self) -> dict[str, Any]:
        """After the last step that was taken."""
        return self.source.state_dict() if self._state is None else self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. What was made ahead is dropped."""
        self.close()
        self.source.load_state_dict(state)
        self._state = self._error = None

    def close(self) -> None:
        """End the thread; waits for the step that it makes. A later step starts one again, from where this one is."""
        if self._worker is None:
            return
        self._worker.stop()
        self._worker.join()
        self._worker = None
        if self._state is not None:
            self.source.load_state_dict(self._state)


class _Worker(Generic[B]):
    """The thread. It knows nothing of its :class:`Ahead`, so that one that is forgotten ends it."""

    def __init__(self, source: Source[B], step: int, depth: int, threads: int) -> None:
        self.next = step
        self._source, self._first = source, step
        self._made: queue.SimpleQueue[_Made[B]] = queue.SimpleQueue()
        self._room, self._stopping, self._ready = threading.Semaphore(depth), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(threads,), name="m4ov-data", daemon=True)
        # torch keeps a number of threads for each thread, and one for threads that have not asked yet, which may be
        # this one; what the new thread does to that is put back.
        before = torch.get_num_threads()
        self._thread.start()
        self._ready.wait()
        torch.set_num_threads(before)

    def take(self) -> _Made[B]:
        made = self._made.get()
        self.next += 1
        self._room.release()
        return made

    def stop(self) -> None:
        self._stopping.set()
        self._room.release()

    def join(self) -> None:
        self._thread.join()

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._ready.set()
        step = self._first
        while True:
            self._room.acquire()
            if self._stopping.is_set():
                return
            try:
                batches = self._source.batches(step)
                self._made.put(_Made(step, batches, self._source.state_dict()))
            except BaseException as error:  # raised where the step is taken
                self._made.put(_Made(step, [], {}, error))
                return
            step += 1

"""Processes that compute a reward which may hang: one that does not answer in time is killed and replaced."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from m4ov.rl.rewards.answers import Answer
from m4ov.rl.rewards.registry import RewardError

_ATTEMPTS = 3  # of an answer whose process ended before it had begun with it


class Outcome(NamedTuple):
    """``failure``: ``None``, or "raised", "timed out" or "died", and then ``message`` says more."""

    value: float
    failure: str | None = None
    message: str = ""


class _Worker:
    """A process; ``index``: the answer that it computes; ``deadline``: by the monotonic clock."""

    def __init__(self, request: bytes, start_seconds: float) -> None:
        # Its own session, so that whatever it starts can be ended with it, and Ctrl-C is the trainer's alone.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "m4ov.rl.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.fd = self.process.stdout.fileno()
        self.buffer = b""
        self.ready = False
        self.index: int | None = None
        self.deadline: float | None = time.monotonic() + start_seconds
        self.send(request)

    def send(self, line: bytes) -> bool:
        """Whether it could be written: not to a process that has ended."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + b"\n")
            self.process.stdin.flush()
        except OSError:
            return False
        return True

    def read(self) -> dict[str, Any] | None:
        """A reply, if one is whole.

        Raises:
            EOFError: it has ended.
        """
        part = os.read(self.fd, 1 << 16)
        if not part:
            raise EOFError
        self.buffer += part
        line, newline, rest = self.buffer.partition(b"\n")
        if not newline:
            return None
        self.buffer = rest
        found: dict[str, Any] = json.loads(line)
        return found

    def kill(self) -> int:
        """End it and what it started; its exit status."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return self.process.wait()


class Pool:
    """One reward function in ``count`` processes.

    Args:
        name, options, low, high: see :func:`m4ov.rl.rewards.registry.build`.
        seconds: for one answer, by the clock on the wall.
        start_seconds: in which a process must have imported its function.

    Attributes:
        low, high, group: of the function, as its process says.
        replaced: processes that were killed or died.

    Raises:
        RewardError: the function cannot be made, or does not start in time.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        *,
        low: float | None = None,
        high: float | None = None,
        seconds: float,
        count: int = 1,
        start_seconds: float = 60.0,
    ) -> None:
        if not seconds > 0:
            raise RewardError(f"seconds: expected more than 0, got {seconds!r}")
        self.name, self.seconds, self.count, self.start_seconds = name, seconds, count, start_seconds
        self.replaced = 0
        wanted = {"name": name, "options": dict(options), "low": low, "high": high, "seconds": seconds}
        try:
            self._request = json.dumps(wanted).encode()
        except (TypeError, ValueError) as error:
            raise RewardError(f"options: expected what JSON can hold ({error})") from None
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._close = weakref.finalize(self, _end, self._workers)
        self.low, self.high, self.group = 0.0, 0.0, False
        with self._lock:
            self._start()
            while not self._workers[0].ready:
                self._turn(None)

    def __call__(self, answers: Sequence[Answer]) -> list[Outcome]:
        """The outcome of each answer, in order."""
        with self._lock:
            outcomes: list[Outcome | None] = [None] * len(answers)
            lines = [answer.to_line().encode() for answer in answers]
            waiting = deque((index, 0) for index in range(len(answers)))
            try:
                while waiting or any(worker.index is not None for worker in self._workers):
                    while len(self._workers) < min(self.count, len(answers)) and self._unserved(waiting):
                        self._start()
                    for worker in list(self._workers):
                        if waiting and worker.ready and worker.index is None:
                            self._give(worker, waiting, lines, outcomes)
                    self._turn(outcomes)
            except BaseException:  # an interrupt: what still computes must not answer the next call
                for worker in [worker for worker in self._workers if worker.index is not None]:
                    self._drop(worker)
                raise
            return [outcome for outcome in outcomes if outcome is not None]

    def close(self) -> None:
        """End all processes."""
        self._close()

    def _unserved(self, waiting: deque[tuple[int, int]]) -> bool:
        """Whether more answers wait than there are processes that are or will be free."""
        return len(waiting) > sum(worker.index is None for worker in self._workers)

    def _give(
        self, worker: _Worker, waiting: deque[tuple[int, int]], lines: list[bytes], outcomes: list[Outcome | None]
    ) -> None:
        index, attempts = waiting.popleft()
        if worker.send(lines[index]):
            worker.index, worker.deadline = index, time.monotonic() + self.seconds
            return
        self._drop(worker)  # it ended while nothing was asked of it
        if attempts + 1 < _ATTEMPTS:
            waiting.appendleft((index, attempts + 1))
        else:
            outcomes[index] = Outcome(0.0, "died", f"{attempts + 1} processes ended before they began")

    def _turn(self, outcomes: list[Outcome | None] | None) -> None:
        """Wait for one reply, end or deadline at least."""
        deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
        if not deadlines:
            return
        for key, _ in self._selector.select(max(0.0, min(deadlines) - time.monotonic())):
            worker = key.data
            try:
                reply = worker.read()
            except EOFError:
                self._ended(worker, outcomes)
                continue
            if reply is None:
                continue
            if not worker.ready:
                self._began(worker, reply)
            elif outcomes is not None and worker.index is not None:
                failed = "error" in reply
                outcomes[worker.index] = Outcome(0.0, "raised", reply["error"]) if failed else Outcome(reply["value"])
                worker.index = None
            worker.deadline = None
        now = time.monotonic()
        for worker in [w for w in self._workers if w.deadline is not None and w.deadline <= now]:
            self._drop(worker)
            if not worker.ready:
                raise RewardError(f"{self.name}: its process did not start in {self.start_seconds:g} s")
            if outcomes is not None and worker.index is not None:
                outcomes[worker.index] = Outcome(0.0, "timed out", f"no value in {self.seconds:g} s")

    def _began(self, worker: _Worker, reply: dict[str, Any]) -> None:
        if "error" in reply:
            self._drop(worker)
            raise RewardError(reply["error"])
        worker.ready = True
        self.low, self.high, self.group = reply["low"], reply["high"], reply["group"]

    def _ended(self, worker: _Worker, outcomes: list[Outcome | None] | None) -> None:
        status = self._drop(worker, ended=True)
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        if not worker.ready:
            raise RewardError(f"{self.name}: its process ended before it could start ({how})")
        if outcomes is not None and worker.index is not None:
            outcomes[worker.index] = Outcome(0.0, "died", f"its process ended ({how})")

    def _start(self) -> None:
        worker = _Worker(self._request, self.start_seconds)
        self._workers.append(worker)
        self._selector.register(worker.fd, selectors.EVENT_READ, worker)

    def _drop(self, worker: _Worker, ended: bool = False) -> int:
        self._selector.unregister(worker.fd)
        self._workers.remove(worker)
        self.replaced += 1
        if ended:  # by itself, or nearly: how is worth knowing
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(0.5)
        return worker.kill()


def _end(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()

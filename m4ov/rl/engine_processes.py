"""Engines in processes of this machine, over pipes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing import connection
from typing import Any

import torch

from m4ov.rl.engine_handover import Hosted
from m4ov.rl.engines import DeathError, Link

#: What the server from which processes are forked imports once. It runs no parallel region, after which a child of a
#: fork would hang in its first.
PRELOAD = ("torch", "m4ov.rl.engine_processes")

_PULSE_SECONDS = 1.0  # how often one that draws says that it does


class ProcessHost:
    """Starts them. ``threads``: of PyTorch, of each."""

    def __init__(self, start: str, threads: int) -> None:
        self.file, self.threads = start, threads
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self.context = multiprocessing.get_context(method)
        if method == "forkserver":
            self.context.set_forkserver_preload(list(PRELOAD))

    def start(self, index: int) -> ProcessLink:
        return ProcessLink(self.context, index, self.file, self.threads)

    def wait(self, links: Sequence[Link], seconds: float) -> None:
        things: list[Any] = []
        for link in links:
            assert isinstance(link, ProcessLink)
            things += [link.pipe, link.process.sentinel]
        if things:
            connection.wait(things, seconds)

    def close(self) -> None:
        """Nothing to close: the server ends with this process."""


class ProcessLink:
    """One of them."""

    def __init__(self, context: Any, index: int, file: str, threads: int) -> None:
        self.pipe, there = context.Pipe()
        # A daemon: it ends with this process, whatever becomes of that.
        self.process = context.Process(
            target=_serve, args=(there, file, threads), name=f"m4ov engine {index}", daemon=True
        )
        self.process.start()
        there.close()
        self.name = f"engine {index} (process {self.process.pid})"
        self.ready, self.heard = False, time.monotonic()

    def ask(self, order: bytes) -> None:
        try:
            self.pipe.send_bytes(order)
        except OSError:
            raise DeathError(self._how()) from None

    def hear(self) -> tuple[str, Any] | None:
        try:
            if not self.pipe.poll(0):
                if self.process.is_alive() or self.pipe.poll(0):
                    return None
                raise EOFError
            said: tuple[str, Any] = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            raise DeathError(self._how()) from None
        self.ready, self.heard = True, time.monotonic()
        return said

    def kill(self) -> None:
        self.process.kill()
        self.close()

    def close(self) -> None:
        self.pipe.close()  # an engine that waits ends at that
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()

    def _how(self) -> str:
        self.process.join(timeout=5)
        code = self.process.exitcode
        if code is None:
            return "it closed its pipe and goes on"
        return f"it died of signal {-code}" if code < 0 else f"it ended with exit status {code}"


def _serve(pipe: Any, file: str, threads: int) -> None:
    """The other process: an engine that draws what comes, until nobody is there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the learner's to answer
    _follow_parent()
    torch.set_num_threads(threads)
    spoken = time.monotonic()

    def say(kind: str, value: Any = None) -> None:
        nonlocal spoken
        spoken = time.monotonic()
        pipe.send_bytes(pickle.dumps((kind, value)))

    def pulse() -> None:
        if time.monotonic() - spoken > _PULSE_SECONDS:
            say("pulse")

    try:
        engine = Hosted(file, pulse)
        say("ready")
        while True:
            order = pipe.recv_bytes()
            say("drawn", engine.draw(order))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the learner has closed the pipe, or is gone
    except Exception:
        with contextlib.suppress(OSError):
            say("failed", traceback.format_exc())


def _follow_parent() -> None:
    """End with the learner, also in the middle of a long step."""
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()

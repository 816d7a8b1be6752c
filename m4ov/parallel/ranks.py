"""A function on N gloo ranks of this machine, for tests and for the parity certificate: about a second each time.

The ranks are forked from a server that has torch imported and has run no parallel region (a child forked after one
hangs in the next), each with one thread.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from m4ov.parallel import hang

#: What the server imports before it forks. Whoever starts it first decides, so tests that start processes of their
#: own name these too.
PRELOAD = ("torch", "torch.distributed.fsdp", "m4ov.parallel.ranks", "m4ov.parallel.parity.fuzz")


class RankError(RuntimeError):
    """A rank failed or hung; the message has each rank's traceback or the place where it stands."""


def run(
    function: Callable[..., Any], world: int, *arguments: Any, timeout: float = 60.0, collective_timeout: float = 20.0
) -> list[Any]:
    """``function(*arguments)`` on each rank, within a process group; returns what the ranks returned, in order.

    Args:
        function: importable by name; what it takes and returns must be picklable.
        timeout: seconds until ranks that still run are ended.
        collective_timeout: seconds that a collective of the world's group waits for its ranks. Groups that the function
            makes itself have their own (:class:`m4ov.parallel.mesh.Mesh` takes a timeout).

    Raises:
        RankError: a rank raised, died or did not end in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    # The store lives here, so that ranks that wait can still tell who is missing after one has died.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="m4ov-ranks-") as name:
        folder = Path(name)
        settings = (world, store.port, folder, collective_timeout)
        ranks: list[Any] = [
            context.Process(target=_rank, args=(rank, *settings, function, arguments), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        _wait(ranks, time.monotonic() + timeout)
        running = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for rank in running:
            os.kill(ranks[rank].pid, signal.SIGUSR1)  # writes where it stands
        if running:
            time.sleep(0.5)
        for process in ranks:
            process.kill()
            process.join()
        reports = [_report(folder, rank, process.exitcode, rank in running) for rank, process in enumerate(ranks)]
        if any(reports):
            lines = "\n".join(report for report in reports if report)
            raise RankError(f"{sum(map(bool, reports))} of {world} ranks failed\n{lines}")
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _wait(ranks: list[Any], deadline: float) -> None:
    """Until all have ended; once one has failed, the others have ten seconds to notice."""
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if any(process.exitcode not in (None, 0) for process in ranks):
            deadline = min(deadline, time.monotonic() + 10.0)
            _wait_all(ranks, deadline)
            return
        time.sleep(0.01)


def _wait_all(ranks: list[Any], deadline: float) -> None:
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))


def _report(folder: Path, rank: int, exitcode: int | None, running: bool) -> str:
    if running:
        place = (folder / f"{rank}.stack").read_text()
        return f"--- rank {rank} did not end; it stood at (innermost first)\n{place}"
    error = folder / f"{rank}.error"
    if error.exists():
        return f"--- rank {rank}\n{error.read_text()}"
    return "" if exitcode == 0 else f"--- rank {rank} died: exit status {exitcode}"


def _rank(
    rank: int,
    world: int,
    port: int,
    folder: Path,
    collective_timeout: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    with (folder / f"{rank}.stack").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, stack)
        try:
            store = dist.TCPStore("127.0.0.1", port, is_master=False)
            limit = timedelta(seconds=collective_timeout)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
            with hang.named():
                result = function(*arguments)
            torch.save(result, folder / f"{rank}.pt")
            with hang.named():
                dist.barrier()  # a rank that leaves earlier would close connections that others still use
            dist.destroy_process_group()
        except BaseException:
            (folder / f"{rank}.error").write_text(traceback.format_exc())
            os._exit(1)

"""A family in a process of its own. What one leaves behind would be in the way of the next: runtimes that keep every
weight they have packed (13 GB after the quantised products, and a machine of 24 GB was too small for what followed),
and their threads."""

from __future__ import annotations

import importlib
import multiprocessing
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from m4ov_bench.row import Machine, Row

if TYPE_CHECKING:
    from m4ov_bench.session import Session


def rows(family: str, session: Session) -> Iterator[Row]:
    """The rows of a family. A process that is killed (out of memory, most often) is a red row that says so.

    Raises:
        RuntimeError: the benchmark raised; its error and, as the cause, its traceback.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    arguments = (there, family, session.machine, session.quick, session.only)
    process = context.Process(target=_work, args=arguments, name=f"m4ov bench {family}")
    process.start()
    there.close()
    try:
        while (message := _next(here)) is not None:
            kind, value = message
            if kind == "row":
                yield value
            elif kind == "say":
                session.say(value)
            elif kind == "error":
                summary, trace = value
                raise RuntimeError(f"bench {family}: {summary}") from RuntimeError(trace)
        process.join()
        if process.exitcode:
            ended = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit status {process.exitcode}"
            problem = f"its process ended with {ended}" + " (out of memory?)" * (process.exitcode == -9)
            yield Row(family, "all", "what is not above", "not measured", "", session.machine, False, {}, problem)
    finally:
        here.close()
        if process.is_alive():  # whoever took the rows wants no more
            process.terminate()
        process.join()


def _next(pipe: Connection) -> tuple[str, Any] | None:
    try:
        return pipe.recv()
    except EOFError:
        return None


def _work(pipe: Connection, family: str, machine: Machine, quick: bool, only: str) -> None:
    import torch

    from m4ov_bench.session import Session

    try:
        torch.manual_seed(machine.seed)
        session = Session(machine, quick, lambda text: pipe.send(("say", text)), only=only)
        for row in importlib.import_module(f"m4ov_bench.{family}").benchmark(session):
            pipe.send(("row", row))
    except BrokenPipeError:
        return
    except Exception as error:
        pipe.send(("error", (f"{type(error).__name__}: {error}", traceback.format_exc())))
    finally:
        pipe.close()

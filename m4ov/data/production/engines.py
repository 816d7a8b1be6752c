"""Who runs the shards of a step: this process, others on this machine, or the workers of a Ray cluster. The result is
the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from m4ov.cores import usable_cores
from m4ov.data.production.steps import BuildError, Done, Task, run
from m4ov.data_recipe import EngineConfig


class Engine(Protocol):
    workers: int

    def map(self, tasks: Sequence[Task]) -> Iterator[Done]:
        """Run tasks; each is handed on when it is done, in whatever order.

        Raises:
            Exception: what a task raised; the others that were running are let go.
        """
        ...

    def close(self) -> None: ...


class LocalEngine:
    """This process, one shard after the other."""

    workers = 1

    def map(self, tasks: Sequence[Task]) -> Iterator[Done]:
        for task in tasks:
            yield run(task)

    def close(self) -> None:
        """Nothing to close."""


class ProcessEngine:
    """Processes of this machine; a step of one shard is this one's. Where one dies, the run stops; begun again, it goes
    on from there."""

    def __init__(self, config: EngineConfig) -> None:
        self.workers = config.workers or usable_cores()
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_belong_to_parent)

    def map(self, tasks: Sequence[Task]) -> Iterator[Done]:
        if len(tasks) < 2:
            yield from LocalEngine().map(tasks)
            return
        running = [self._pool.submit(run, task) for task in tasks]
        try:
            for one in as_completed(running):
                yield one.result()
        except BrokenProcessPool as error:
            raise BuildError(f"{tasks[0].step}: a worker process died (killed, or out of memory?)") from error
        finally:
            for one in running:
                one.cancel()

    def close(self) -> None:
        """End the processes; shards that they work on are finished."""
        self._pool.shutdown(cancel_futures=True)


def _belong_to_parent() -> None:
    """Ctrl-C is the parent's to answer; and whoever outlives it has nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class RayEngine:
    """Shards as Ray tasks. A worker that dies takes nothing with it: its shard is begun again.

    Ray is started on this machine, unless it runs already or ``RAY_ADDRESS`` names a cluster; then the run folder must
    be on a file system that all its machines see.

    Raises:
        ImportError: Ray is not installed.
    """

    def __init__(self, config: EngineConfig) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError("engine.kind=ray needs Ray: pip install 'm4ov[ray]'") from error
        self._ray: Any = ray
        self._started = not ray.is_initialized()
        if self._started:
            options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
            if not os.environ.get("RAY_ADDRESS"):
                options["num_cpus"] = config.workers or os.cpu_count()
            ray.init(**options)
        self.workers = config.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        # An exception is an answer, and is not repeated; a worker that died gave none.
        self._run = ray.remote(num_cpus=1, max_retries=config.retries, retry_exceptions=False)(run)
        self._retries = config.retries

    def map(self, tasks: Sequence[Task]) -> Iterator[Done]:
        ray = self._ray
        waiting = list(reversed(tasks))
        running: dict[Any, Task] = {}
        try:
            while waiting or running:
                while waiting and len(running) < 2 * self.workers:
                    task = waiting.pop()
                    running[self._run.remote(task)] = task
                ready, _ = ray.wait(list(running))
                for reference in ready:
                    task = running.pop(reference)
                    yield self._result(reference, task)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    def _result(self, reference: Any, task: Task) -> Done:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except self._ray.exceptions.WorkerCrashedError as error:
            raise BuildError(f"{task.name}: its worker died {self._retries + 1} times ({error})") from error

    def close(self) -> None:
        """End Ray, if this object started it."""
        if self._started:
            self._ray.shutdown()


def engine_of(config: EngineConfig) -> Engine:
    """The engine that a recipe names."""
    if config.kind == "ray":
        return RayEngine(config)
    return ProcessEngine(config) if config.kind == "processes" else LocalEngine()

"""Engines as actors of a Ray cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from m4ov.rl.engine_handover import Hosted
from m4ov.rl.engines import DeathError, Link


class RayHost:
    """Starts them. Ray is started on this machine, unless it runs already or ``RAY_ADDRESS`` names a cluster; then the
    file must be on a file system that all its machines see.

    Args:
        count: engines; each takes a CPU of the cluster.

    Raises:
        ImportError: Ray is not installed.
        ValueError: the cluster has fewer CPUs than that, and would keep some waiting for ever.
    """

    def __init__(self, start: str, count: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError("rollout.engine_kind=ray needs Ray: pip install 'm4ov[ray]'") from error
        self.file, self.ray = start, ray
        self._started = not ray.is_initialized()
        if self._started:
            options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
            if not os.environ.get("RAY_ADDRESS"):
                options["num_cpus"] = max(count, os.cpu_count() or 1)
            ray.init(**options)
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if cpus < count:
            self.close()
            raise ValueError(f"rollout.engines: expected at most {cpus}, the CPUs of the Ray cluster; got {count}")
        # An actor that died is started again by whoever asked it, with the weights as they are then.
        self._actor: Any = ray.remote(num_cpus=1, max_restarts=0)(Hosted)

    def start(self, index: int) -> RayLink:
        return RayLink(self.ray, self._actor.remote(self.file), index)

    def wait(self, links: Sequence[Link], seconds: float) -> None:
        answers = []
        for link in links:
            assert isinstance(link, RayLink)
            answers += [] if link.answer is None else [link.answer]
        if answers:
            self.ray.wait(answers, num_returns=1, timeout=seconds)

    def close(self) -> None:
        """End Ray, if this object started it."""
        if self._started:
            self.ray.shutdown()


class RayLink:
    """One of them. Ray watches over its process, so that a call which is not answered yet counts as heard."""

    def __init__(self, ray: Any, actor: Any, index: int) -> None:
        self.ray, self.actor = ray, actor
        self.answer: Any = None  # that is asked for
        self.name = f"engine {index} (a Ray actor)"
        self.ready, self.heard = True, time.monotonic()  # calls wait for it

    def ask(self, order: bytes) -> None:
        self.answer = self.actor.draw.remote(order)

    def hear(self) -> tuple[str, Any] | None:
        self.heard = time.monotonic()
        if self.answer is None or not self.ray.wait([self.answer], timeout=0)[0]:
            return None
        answer, self.answer = self.answer, None
        try:
            return "drawn", self.ray.get(answer)
        except self.ray.exceptions.RayTaskError as error:
            return "failed", str(error)
        except self.ray.exceptions.RayActorError as error:
            raise DeathError(f"it died ({(str(error).splitlines() or [''])[0]})") from None

    def kill(self) -> None:
        self.ray.kill(self.actor)

    def close(self) -> None:
        self.kill()

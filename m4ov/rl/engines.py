"""Engines in processes of their own, behind the sampler's protocol: prompts spread over them, weights handed over by
version, and a process that dies replaced."""

from __future__ import annotations

import logging
import pickle
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from m4ov.generate import SamplingOptions
from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.rl.engine_handover import Handover, Order, portable
from m4ov.rl.rollouts import Drawn
from m4ov_kernels.packing import Sample

START_SECONDS = 120.0  # in which an engine must be ready
STALL_SECONDS = 300.0  # in which one that draws must have made a step


class EngineError(RuntimeError):
    """An engine's process failed; the message names it and says how."""


class DeathError(Exception):
    """A process ended without an answer; the message says how."""


class Link(Protocol):
    """An engine elsewhere, seen from here.

    Attributes:
        name: for messages. ``ready``: it can be asked. ``heard``: when it last said something, by the monotonic clock.
    """

    name: str
    ready: bool
    heard: float

    def ask(self, order: bytes) -> None:
        """Raises :class:`DeathError`: there is nobody."""

    def hear(self) -> tuple[str, Any] | None:
        """What it says, without waiting: ("ready", …), ("pulse", …), ("drawn", answers) or ("failed", text); ``None``:
        nothing. Raises :class:`DeathError`."""

    def kill(self) -> None:
        """End it now."""

    def close(self) -> None:
        """Let it end; then end it."""


class Host(Protocol):
    """Where engines are started."""

    def start(self, index: int) -> Link: ...

    def wait(self, links: Sequence[Link], seconds: float) -> None:
        """Until one of them has something to say, or is gone, or the time is over."""

    def close(self) -> None: ...


class Engines:
    """A sampler of several engines (:class:`~m4ov.rl.rollouts.Sampler`).

    Prompts go to them in blocks of about one size, in order. What is drawn for a prompt follows from the weights, the
    prompt and its seed, where numerics are shared: so the number of engines changes nothing, and when one dies, another
    in its place draws the same. It is started once again in a draw; where it dies a second time, the draw fails.

    Attributes:
        deaths: what was said of each process that died.
    """

    def __init__(
        self,
        host: Host,
        handover: Handover,
        count: int,
        *,
        start_seconds: float = START_SECONDS,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self.host, self.handover = host, handover
        self.start_seconds, self.stall_seconds = start_seconds, stall_seconds
        self.deaths: list[str] = []
        self.closed = False
        self.links: list[Link | None] = [None] * count
        for engine in range(count):  # all at once, while the learner goes on
            self.links[engine] = host.start(engine)

    def draw(self, prompts: Sequence[Sample], seeds: Sequence[int]) -> list[list[Drawn]]:
        """See :class:`~m4ov.rl.rollouts.Sampler`.

        Raises:
            EngineError: a process died twice, was not ready in time, or its engine raised. All can be asked again.
        """
        if self.closed:
            raise EngineError("the engines are closed")
        version, weights = self.handover.newest()
        shares = [share.tolist() for share in np.array_split(np.arange(len(prompts)), len(self.links))]
        orders = {}
        for engine, share in enumerate(shares):
            if share:
                own, drawn = portable([prompts[place] for place in share]), [seeds[place] for place in share]
                orders[engine] = pickle.dumps(Order(version, weights, own, drawn))
        found: dict[int, list[list[Drawn]]] = {}
        asked: set[int] = set()
        died: Counter[int] = Counter()
        try:
            while len(found) < len(orders):
                waiting = [engine for engine in orders if engine not in found]
                for engine in waiting:
                    death = self._attend(engine, orders[engine], asked, found)
                    if death is not None:
                        self._replace(engine, death, len(shares[engine]), again=not died[engine])
                        asked.discard(engine)
                        died[engine] += 1
                links = [self.links[engine] for engine in waiting if engine not in found]
                if None not in links:
                    self.host.wait([link for link in links if link is not None], 1.0)
        except BaseException:
            for engine in orders:  # what still draws must not answer the next call
                if engine not in found:
                    self._drop(engine)
            raise
        return [answers for engine in orders for answers in found[engine]]

    def close(self) -> None:
        """End all processes."""
        self.closed = True
        links, self.links = self.links, [None] * len(self.links)
        for link in links:
            if link is not None:
                link.close()
        self.host.close()

    def _attend(
        self, engine: int, order: bytes, asked: set[int], found: dict[int, list[list[Drawn]]]
    ) -> DeathError | None:
        """Start, ask and hear an engine, as far as that goes without waiting; how it died, if it did."""
        try:
            self._talk(engine, order, asked, found)
        except DeathError as death:
            return death
        return None

    def _talk(self, engine: int, order: bytes, asked: set[int], found: dict[int, list[list[Drawn]]]) -> None:
        link = self.links[engine]
        if link is None:
            link = self.links[engine] = self.host.start(engine)
        while engine not in found:
            said = link.hear()
            if said is not None and said[0] == "failed":
                raise EngineError(f"{link.name}: {said[1]}")
            if link.ready and engine not in asked:
                link.ask(order)
                asked.add(engine)
                link.heard = time.monotonic()
            elif said is None:
                break
            elif said[0] == "drawn":
                found[engine] = said[1]
        limit = self.stall_seconds if link.ready else self.start_seconds
        if engine not in found and time.monotonic() - link.heard > limit:
            doing = "has made no step for" if link.ready else "was not ready in"
            raise DeathError(f"it {doing} {limit:g} s")

    def _replace(self, engine: int, death: DeathError, prompts: int, *, again: bool) -> None:
        link = self.links[engine]
        assert link is not None
        what = f"{link.name}, with {prompts} prompts to draw: {death}"
        self.deaths.append(what)
        self._drop(engine)
        if not again:
            raise EngineError(f"{what}; it had been started again in this draw already")
        logging.getLogger(__name__).warning("%s; it is started again, and draws them again with the same seeds", what)

    def _drop(self, engine: int) -> None:
        link, self.links[engine] = self.links[engine], None
        if link is not None:
            link.kill()


def engines(
    model: Qwen3VL,
    tokenizer: Any,
    options: SamplingOptions,
    settings: dict[str, Any],
    *,
    count: int,
    kind: str,
    folder: Path,
) -> tuple[Engines, Path]:
    """So many engines of a kind, and the folder in ``folder`` that is to be removed when they are closed."""
    folder.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix="engines-", dir=folder)).resolve()
    try:
        handover = Handover(model, tokenizer, options, settings, own)
        host: Host
        if kind == "ray":
            from m4ov.rl.engine_ray import RayHost

            host = RayHost(handover.start, count)
        else:
            from m4ov.rl.engine_processes import ProcessHost

            host = ProcessHost(handover.start, max(1, torch.get_num_threads() // count))
        return Engines(host, handover, count), own
    except BaseException:
        shutil.rmtree(own, ignore_errors=True)
        raise

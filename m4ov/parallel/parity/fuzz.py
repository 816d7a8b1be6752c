"""Random layouts with random batches, in float64: what a layout adds is then 1e-15, and a mistake cannot hide."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.distributed as dist

from m4ov.parallel import ranks
from m4ov.parallel.mesh import Layout, LayoutError, ModelSizes, check, layouts
from m4ov.parallel.parity import cases, certificate, steps
from m4ov.parallel.parity.cases import Draw
from m4ov.parallel.parity.steps import Difference

TOLERANCE = 1e-10
HEADS = ((8, 4), (4, 4), (4, 2), (8, 8), (8, 2), (2, 2))
WORLDS = (2, 2, 2, 4, 4, 8)


@dataclass(frozen=True)
class Pair:
    """A layout and a batch, of a seed: ``pair(seed)`` makes it again."""

    seed: int
    layout: Layout
    draw: Draw


@dataclass(frozen=True)
class Outcome:
    """How far a pair is from one process: its loss, norm and gradients."""

    pair: Pair
    difference: Difference

    @property
    def good(self) -> bool:
        return self.difference.largest <= TOLERANCE


def pair(seed: int) -> Pair:
    """Every number of it follows from ``seed``."""
    rng = random.Random(seed)
    draw = Draw(
        kind=rng.choice(cases.KINDS),
        heads=rng.choice(HEADS),
        samples=rng.randint(1, 12),
        images=rng.choice([0, 1, 1, 2, 3]),
        text_only=rng.choice([0.0, 0.25, 0.5, 1.0]),
        longest=rng.choice([2, 8, 24, 48]),
        seed=seed,
    )
    legal = [layout for layout in _layouts(rng.choice(WORLDS)) if _legal(layout, draw)]
    layout = rng.choice(legal)
    return Pair(seed, layout, replace(draw, samples=max(draw.samples, layout.data), bias=rng.random() < 0.2))


@cache
def _layouts(world: int) -> list[Layout]:
    return [layout for layout in layouts(world) if layout.pp == layout.cp == 1]


def _legal(layout: Layout, draw: Draw) -> bool:
    try:
        check(layout, layout.world, ModelSizes.of(draw.config))
    except LayoutError:
        return False
    return True


def run(seeds: Sequence[int], *, at_once: int = 12, timeout: float = 240.0) -> Iterator[Outcome]:
    """``at_once``: pairs of one world that the same ranks go through."""
    pairs = [pair(seed) for seed in seeds]
    for world in sorted({one.layout.world for one in pairs}):
        of_world = [one for one in pairs if one.layout.world == world]
        for first in range(0, len(of_world), at_once):
            yield from ranks.run(job, world, of_world[first : first + at_once], timeout=timeout)[0]


def job(pairs: Sequence[Pair]) -> list[Outcome] | None:
    """On every rank; the outcomes are rank 0's, which computes alone what all are compared with."""
    outcomes, meshes = [], {layout: certificate.mesh_of(layout) for layout in dict.fromkeys(p.layout for p in pairs)}
    for one in pairs:
        made = certificate.parallel(meshes[one.layout], one.draw, train=0, dtype=torch.float64)
        if dist.get_rank() == 0:
            wanted = certificate.reference(one.draw, train=0, dtype=torch.float64)
            outcomes.append(Outcome(one, steps.compare(made, wanted)))
    return outcomes or None

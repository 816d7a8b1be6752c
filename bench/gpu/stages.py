"""Which stages there are, in the order of their worth, and how long each may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """``module``: of ``m4ov_bench.gpu``, with ``run(context)``. ``limit``: seconds. ``group``: stages of one number run
    side by side (checks), the groups one after the other; a stage that measures is alone in its group."""

    module: str
    limit: float
    group: int
    operator: str = ""

    @property
    def name(self) -> str:
        return f"{self.module}:{self.operator}" if self.operator else self.module


MACHINE = Stage("machine", 60, 0)


def plan(operators: Sequence[str]) -> list[Stage]:
    """The stages after ``MACHINE``, which says what operators there are."""
    stages = [Stage("numerics", 120, 1, name) for name in operators]
    stages += [Stage("properties", 120, 1, name) for name in operators]
    stages += [Stage("speed", 80, 2 + index, name) for index, name in enumerate(operators)]
    last = 2 + len(operators)
    return [*stages, Stage("training", 110, last), Stage("sanitizer", 100, last + 1), Stage("tests", 240, last + 1)]

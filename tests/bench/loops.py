"""Loops that the tests of :mod:`m4ov_bench.turns` run in other processes."""

from __future__ import annotations

import os
from pathlib import Path

from m4ov_bench.turns import Turns


def counting(turns: Turns, name: str, file: Path) -> int:
    """Writes its name at every step; returns how many there were."""
    steps, going = 0, turns.begin()
    while going:
        with file.open("a") as log:
            log.write(name)
        steps += 1
        going = turns.next()
    return steps


def failing(turns: Turns) -> None:
    if turns.begin() and turns.next():
        raise ValueError("no more of this\nand a second line")


def dying(turns: Turns) -> None:
    turns.begin()
    os._exit(1)

"""``decisions.jsonl`` of an arm: every decision is one line, with the figures that it rests on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from m4ov.data.whole import write_whole


class DecisionLog:
    """Written by rank 0 alone; an arm that goes on forgets what came after the step that it goes on from.

    A row names its stage (``stage``, from 1) and the step in it (``step``); rows hold no times, so that the file of a
    run that was killed and went on is that of one that was not.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def rows(self) -> list[dict[str, Any]]:
        """All lines; a last one that a crash cut off is left out."""
        return read(self.path)

    def go_on(self, stage: int, step: int) -> None:
        """Keep the earlier stages, and of this one what was decided up to ``step``; -1: nothing."""
        if not self.writes:
            return
        kept = [row for row in self.rows() if (row["stage"], row["step"]) <= (stage, step)]
        write_whole(self.path, "".join(f"{json.dumps(row)}\n" for row in kept))

    def write(self, row: dict[str, Any]) -> None:
        """One line more, on the disk when this returns."""
        if not self.writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(row)}\n")
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; none, if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("}\n")]

"""What one stage found, on disk after every check and every measurement, so that nothing is lost if it is cut off."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
NO_DEVICE = "no CUDA device"
_LONGEST = 1200  # characters of a problem


class NotRun(Exception):  # noqa: N818 - it is no error
    """Raised inside :meth:`Part.check`: this could not be judged here; the message says why."""


def write_atomically(path: Path, text: str) -> None:
    """The whole new file or the whole old one, whenever the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


class Part:
    """The JSON of one stage: ``checks`` (each with a status and, if it did not pass, the problem), ``rows`` (figures),
    ``facts`` and ``complete``, which is true once the stage has run to its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"checks": [], "rows": [], "facts": {}, "complete": False}
        self._write()

    def _write(self) -> None:
        write_atomically(self.path, json.dumps(self.data, ensure_ascii=False))

    @contextmanager
    def check(self, what: str, **about: Any) -> Iterator[dict[str, Any]]:
        """Run a check. It passes unless the block raises: :class:`NotRun` says why it could not be judged, anything
        else is red. What is put into the yielded dictionary is kept with the check."""
        found: dict[str, Any] = {}
        status, problem, begun = PASSED, "", time.perf_counter()
        try:
            yield found
        except NotRun as reason:
            status, problem = NOT_RUN, str(reason)
        except Exception as error:
            status, problem = FAILED, f"{type(error).__name__}: {error}"[:_LONGEST]
            traceback.print_exc()
        seconds = round(time.perf_counter() - begun, 3)
        line = {"what": what, **about, **found, "status": status, "problem": problem, "seconds": seconds}
        self.data["checks"].append(line)
        self._write()
        print(f"{status}: {what} {about} {problem[:200]}", file=sys.stderr, flush=True)

    def row(self, **figures: Any) -> None:
        """One measurement."""
        self.data["rows"].append(figures)
        self._write()
        print(f"measured: {figures}"[:400], file=sys.stderr, flush=True)

    def facts(self, **facts: Any) -> None:
        self.data["facts"].update(facts)
        self._write()

    def finish(self) -> None:
        self.data["complete"] = True
        self._write()

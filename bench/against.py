"""Two commits in one run: ``m4ov bench --against REV``.

``REV`` is exported, built into a folder of its own, and its own benchmark runs by turns with this tree's, each in a new
process with the same environment, so that both see the same machine. A row's figure is the median over the rounds of
the ratio of its times; what differs only within the spread of the rounds is said to be equal.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
# An editable install's finder would serve this tree's modules wherever the other commit lacks one.
_ALONE = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable___m4ov_")]
"""
_WHERE = "import m4ov_kernels, m4ov_bench; print(m4ov_kernels.__file__); print(m4ov_bench.__file__)"


@dataclass(frozen=True)
class Comparison:
    """One row of both commits: seconds per round, and ``ratios`` (then over now, per round; above 1: now is faster).

    ``then`` or ``now`` is empty where only one of the commits has the row.
    """

    operator: str
    case: str
    what: str
    then: tuple[float, ...]
    now: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        return tuple(a / b for a, b in zip(self.then, self.now, strict=False))

    @property
    def verdict(self) -> str:
        """``"faster"`` or ``"slower"`` where every round says so, by 2% in the median; else ``"equal"``."""
        if not self.then or not self.now:
            return "new" if self.now else "gone"
        middle = statistics.median(self.ratios)
        if min(self.ratios) > 1 and middle > 1.02:
            return "faster"
        if max(self.ratios) < 1 and middle < 1 / 1.02:
            return "slower"
        return "equal"


def compare(
    revision: str,
    families: Sequence[str],
    quick: bool,
    rounds: int,
    say: Callable[[str], None] = lambda _: None,
    case: str = "",
) -> list[Comparison]:
    """Measure ``revision`` and the package that is running, by turns.

    Raises:
        ValueError: this is no checkout, or it has no such revision, or ``rounds`` is less than 1.
        RuntimeError: the revision cannot be built, or one of the benchmarks fails; carries what it said last.
    """
    if rounds < 1:
        raise ValueError(f"--rounds must be 1 or more; got {rounds}")
    commit = _resolve(revision)
    options = [*families, *["--quick"] * quick, *(["--case", case] if case else [])]
    with tempfile.TemporaryDirectory(prefix="m4ov-against-") as folder:
        work = Path(folder)
        say(f"building {revision} ({commit[:12]})")
        site = _build(commit, work)
        sides: dict[str, list[dict[Any, float]]] = {"then": [], "now": []}
        for number in range(rounds):
            for side in ("then", "now") if number % 2 == 0 else ("now", "then"):
                say(f"round {number + 1} of {rounds}: {revision if side == 'then' else 'this tree'}")
                sides[side].append(_measure(options, work, site if side == "then" else None))
    keys = dict.fromkeys(key for results in sides.values() for result in results for key in result)
    return [
        Comparison(
            *key,
            *(
                tuple(result[key] for result in sides[side]) if all(key in result for result in sides[side]) else ()
                for side in ("then", "now")
            ),
        )
        for key in keys
    ]


def _resolve(revision: str) -> str:
    if not (_ROOT / ".git").exists():
        raise ValueError(f"--against needs a checkout of the repository; {_ROOT} is none (install with pip install -e)")
    command = ["git", "-C", str(_ROOT), "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise ValueError(f"--against: the repository has no revision {revision!r}")
    return found.stdout.strip()


def _build(commit: str, work: Path) -> Path:
    """The folder in which the commit is installed, with its own extension, without dependencies."""
    source, site = work / "source", work / "site"
    source.mkdir()
    archive = subprocess.run(["git", "-C", str(_ROOT), "archive", commit], capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive, check=True)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(source)]
    _checked(command, os.environ | {"M4OV_BUILD": os.environ.get("M4OV_BUILD", "1")}, work, f"building {commit[:12]}")
    (site / "sitecustomize.py").write_text(_ALONE, encoding="utf-8")
    return site


def _measure(options: Sequence[str], work: Path, site: Path | None) -> dict[Any, float]:
    """Seconds of every green row, by (operator, case, what)."""
    environment = dict(os.environ)
    if site is not None:
        environment["PYTHONPATH"] = str(site)
        for line in _checked([sys.executable, "-c", _WHERE], environment, work, "importing it").splitlines():
            if not Path(line).is_relative_to(site):
                raise RuntimeError(f"the other commit's process imports {line}, not what was built in {site}")
    out = work / "rows.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "m4ov_bench", *options, "--json", str(out)]
    _checked(command, environment, work, "its benchmark")
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    return {(r["operator"], r["case"], r["what"]): r["seconds"] for r in rows if r["seconds"] is not None}


def _checked(command: list[str], environment: dict[str, str], work: Path, doing: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=work)
    if done.returncode:
        last = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-8:])
        raise RuntimeError(f"{doing} failed with status {done.returncode}:\n{last}")
    return done.stdout

"""``python -m m4ov_bench.gpu``: the stages, after :mod:`m4ov_bench.gpu.install` has installed the checkout.

Exit status: 0 if every check that could be judged passed; 1 if one is red, a stage crashed or the build failed; 3 if
nothing is red but something was cut off.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from m4ov_bench.gpu import results, runner
from m4ov_bench.gpu.part import PASSED

_STATUS = {PASSED: 0, runner.CUT_OFF: 3}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m m4ov_bench.gpu", description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="the folder for the JSON file and the table")
    parser.add_argument("--work", type=Path, required=True, help="the folder for the stages' own files and logs")
    parser.add_argument("--source", type=Path, default=Path(), help="the checkout (default: here)")
    parser.add_argument("--build", type=Path, help="the record that install.py wrote")
    parser.add_argument("--minutes", type=float, default=8.0, help="budget, the build included (default: 8)")
    parser.add_argument("--commit", default="", help="where the checkout has no .git: what it was made from")
    parser.add_argument("--seed", type=int, help="of the inputs (default: fresh)")
    parser.add_argument("--jobs", type=int, default=max(2, min(6, (os.cpu_count() or 2) // 2)), help="checks at a time")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, interpreted, tiny: proves the script only")
    arguments = parser.parse_args()
    begun = time.monotonic()
    build = json.loads(arguments.build.read_text(encoding="utf-8")) if arguments.build else None
    spent = build["seconds"] if build else 0.0
    seed = int.from_bytes(os.urandom(4), "little") if arguments.seed is None else arguments.seed
    about: dict[str, Any] = {
        "dry_run": arguments.dry_run,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **_commit(arguments.source, arguments.commit),
        "seed": seed,
        "budget_minutes": arguments.minutes,
        "build": build or {"status": PASSED, "problem": "installed before", "seconds": 0.0},
    }
    arguments.work.mkdir(parents=True, exist_ok=True)
    settings = runner.Settings(
        work=arguments.work.resolve(),
        source=arguments.source.resolve(),
        device="cpu" if arguments.dry_run else "cuda",
        seed=seed,
        deadline=begun + 60 * arguments.minutes - spent,
        jobs=arguments.jobs,
    )
    written: list[Path] = []

    def report(outcomes: list[runner.Outcome]) -> None:
        made = results.assembled(outcomes, about | {"seconds": round(time.monotonic() - begun + spent, 1)})
        stem = written[0] if written else arguments.results / results.file_name(made)
        written.append(stem)
        results.write(made, stem)

    outcomes = runner.run(settings, report)
    verdict = results.assembled(outcomes, about | {"seconds": 0.0})["verdict"]
    print(written[0].with_name(written[0].name + ".md").read_text(encoding="utf-8"))
    print(f"{'dry run ' if arguments.dry_run else ''}{verdict}: {written[0]}.json and .md")
    return _STATUS.get(verdict, 1)


def _commit(source: Path, given: str) -> dict[str, Any]:
    """The commit of the checkout, and whether it differs from it; ``given`` where there is no repository."""
    if not (source / ".git").exists() or shutil.which("git") is None:
        return {"commit": given, "dirty": False}
    answers = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain"]):
        done = subprocess.run(["git", "-C", str(source), *command], capture_output=True, text=True)
        answers.append(done.stdout.strip())
    return {"commit": answers[0] or given, "dirty": bool(answers[1])}


if __name__ == "__main__":
    sys.exit(main())

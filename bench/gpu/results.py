"""The results of a run: one JSON file that holds everything, and one table in Markdown made from it alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from m4ov_bench.gpu.part import FAILED, NOT_RUN, PASSED, write_atomically
from m4ov_bench.gpu.runner import Outcome, verdict

SCHEMA = 1


def assembled(outcomes: Sequence[Outcome], about: dict[str, Any]) -> dict[str, Any]:
    """Everything as plain data. ``about``: commit, date, seed, budget, build, …"""
    facts: dict[str, Any] = {}
    for outcome in outcomes:
        facts |= outcome.part["facts"]
    return {
        "schema": SCHEMA,
        "verdict": _with_build(verdict(outcomes), about),
        **about,
        "machine": facts,
        "stages": [
            {
                "stage": outcome.stage.name,
                "status": outcome.status,
                "seconds": round(outcome.seconds, 1),
                "limit": outcome.stage.limit,
                "problem": outcome.problem,
                "log": outcome.log,
                "checks": dict(Counter(check["status"] for check in outcome.part["checks"])),
            }
            for outcome in outcomes
        ],
        "rows": [row for outcome in outcomes for row in outcome.part["rows"]],
        "checks": [{"stage": o.stage.name, **check} for o in outcomes for check in o.part["checks"]],
    }


def _with_build(found: str, about: dict[str, Any]) -> str:
    return found if about.get("build", {}).get("status", PASSED) == PASSED else FAILED


def file_name(results: dict[str, Any]) -> str:
    """``<gpu>-<day>-<commit>``, without a suffix; the same for every writing of one run."""
    gpu = "dry-run" if results["dry_run"] else results["machine"].get("gpu", "unknown GPU")
    parts = (gpu, results["date"].replace(":", "")[:15], results["commit"][:12] or "no-commit")
    return "-".join(re.sub(r"[^A-Za-z0-9]+", "-", part).strip("-").lower() for part in parts)


def write(results: dict[str, Any], stem: Path) -> None:
    write_atomically(stem.with_name(f"{stem.name}.json"), json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_atomically(stem.with_name(f"{stem.name}.md"), markdown(results))


def markdown(results: dict[str, Any]) -> str:
    machine, limits = results["machine"], results["machine"].get("limits", {})
    lines = [f"# GPU suite: {machine.get('gpu', 'unknown GPU')}", ""]
    if results["dry_run"]:
        lines += ["**A dry run on the CPU with tiny shapes: no figure here means anything.**", ""]
    dry = " (of the script, not of any kernel on a GPU)" if results["dry_run"] else ""
    lines += [
        f"Verdict: **{results['verdict']}**{dry}. {results['date']}, {results['seconds']:.0f} s, {_commit(results)}."
    ]
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    lines += [f"Driver {machine.get('driver', 'none')}; {versions}.", f"Seed {results['seed']}."]
    measured = ", ".join(f"{name.split()[0]} {_si(value)}{name.split()[-1]}" for name, value in limits.items())
    lines += [f"Measured limits: {measured or 'none'}.", "", "| stage | status | time | passed | red | not run | |"]
    lines += ["|---|---|---|---|---|---|---|"]
    build = results.get("build")
    if build:
        lines.append(_line("build", build["status"], f"{build['seconds']:.0f} s", "", "", "", _short(build["problem"])))
    for stage in results["stages"]:
        counts = [stage["checks"].get(status, 0) for status in (PASSED, FAILED, NOT_RUN)]
        problem = _short(stage["problem"])
        lines.append(_line(stage["stage"], stage["status"], f"{stage['seconds']:.0f} s", *counts, problem))
    operators = [row for row in results["rows"] if row["family"] not in ("step", "overhead")]
    lines += ["", *_operators(operators, limits)] if operators else []
    lines += [f"\nNot measured: {name}: {why}." for name, why in machine.get("peers without a counterpart", {}).items()]
    steps = [row for row in results["rows"] if row["family"] == "step"]
    lines += ["", *_steps(steps)] if steps else []
    lines += _overheads([row for row in results["rows"] if row["family"] == "overhead"])
    red = [check for check in results["checks"] if check["status"] == FAILED]
    lines += ["", "Red:", ""] if red else []
    lines += [f"- {check['stage']}: {check['what']} {_about(check)}: {_short(check['problem'], 300)}" for check in red]
    reasons = Counter((check["stage"], check["problem"]) for check in results["checks"] if check["status"] == NOT_RUN)
    lines += ["", "Not run:", ""] if reasons else []
    lines += [f"- {stage}: {count} checks: {_short(reason)}" for (stage, reason), count in reasons.items()]
    return "\n".join(lines) + "\n"


def _operators(rows: Iterable[dict[str, Any]], limits: dict[str, float]) -> list[str]:
    head = "| operator | case | what | kernels | µs | rate | of its limit | memory | peers: µs (ratio to ours) |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        fraction = "" if row["fraction"] is None else f"{row['fraction']:.0%} of {row['limit']}"
        rate = "" if row["rate"] is None else f"{_si(row['rate'])}{row['unit']}/s"
        if row["unit"] == "B" and limits.get("copy B/s") and row["rate"]:
            rate += f" ({row['rate'] / limits['copy B/s']:.0%} of the measured copy)"
        memory = "" if row["memory_mib"] is None else f"+{row['memory_mib']:.0f} MiB"
        peers = "; ".join(_peer(name, peer) for name, peer in row["peers"].items())
        time = f"{row['seconds'] * 1e6:.1f}"
        what = (row["operator"], row["case"], row["what"], row["implementation"])
        lines.append(_line(*what, time, rate, fraction, memory, peers))
    return lines


def _peer(name: str, peer: dict[str, Any]) -> str:
    memory = "" if peer["memory_mib"] is None else f", +{peer['memory_mib']:.0f} MiB"
    if peer["seconds"] is None:
        return f"{name}: {peer['absent']}{memory}"
    return f"{name} {peer['seconds'] * 1e6:.1f} ({peer['ratio']:.2f} ×{memory})"


def _steps(rows: Iterable[dict[str, Any]]) -> list[str]:
    lines = ["| training step | who | time | tokens/s | peak memory | time over ours |", "|---|---|---|---|---|---|"]
    for row in rows:
        if "absent" in row:
            lines.append(_line(row["case"], row["what"], row["absent"], "", "", ""))
            continue
        memory = "" if row["peak_mib"] is None else f"{row['peak_mib'] / 1024:.1f} GiB"
        ratio = f"{row['ratio']:.2f} ×" if row.get("ratio") else ""
        figures = (f"{row['seconds'] * 1e3:.1f} ms", f"{row['tokens_per_second']:.0f}", memory, ratio)
        lines.append(_line(row["case"], row["what"], *figures))
    return lines


def _overheads(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["", "Host time of a small call without gradients, µs:", ""] if rows else []
    for row in rows:
        times = ", ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in row["seconds_of"].items())
        lines.append(f"- {row['operator']}: {times}")
    return lines


def _line(*cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _short(text: str, most: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _about(check: dict[str, Any]) -> str:
    return ", ".join(str(check[name]) for name in ("operator", "backend", "dtype", "case") if name in check)


def _commit(results: dict[str, Any]) -> str:
    return f"commit {results['commit'] or 'unknown'}" + (" with uncommitted changes" if results["dirty"] else "")


def _si(value: float) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "

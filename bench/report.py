"""Rows as a table in the terminal and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from m4ov_bench.against import Comparison
from m4ov_bench.row import Machine, Peer, Row

_UNITS = {"B": "GB/s", "FLOP": "GFLOP/s", "OP": "GOP/s"}


def print_machine(machine: Machine, console: Console) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    limits = ", ".join(f"{name} {value / 1e9:.0f} G" for name, value in machine.limits.items())
    console.print(f"{machine.cpu}, {machine.threads} threads of {machine.cores} cores, {machine.isa}; {versions}")
    console.print(f"measured now: {limits}")
    console.print(
        f"allocator: {machine.allocator}"
        + f"; commit {machine.commit}" * bool(machine.commit)
        + f"; seed {machine.seed}"
    )


def table(rows: Iterable[Row], title: str) -> Table:
    """One line for each row; the peers as time and ratio (above 1: ours is faster)."""
    made = Table(title=title, title_justify="left", show_lines=True)
    for name in ("case", "what", "time", "rate", "of the limit"):
        made.add_column(name, justify="left" if name in ("case", "what") else "right")
    made.add_column("peers: their time (ratio to ours)")
    made.add_column("error", justify="right")
    for row in rows:
        if not row.green:
            made.add_row(_case(row), row.what, "[red]RED[/red]", "", "", f"[red]{escape(row.problem)}[/red]", "")
            continue
        peers = [_peer(name, peer) for name, peer in row.peers.items()]
        if row.memory_mib is not None:
            peers.insert(0, f"[bold]m4ov: +{row.memory_mib:.0f} MiB beyond inputs and outputs[/bold]")
        fraction = "" if row.fraction is None else f"{row.fraction:.0%}"
        made.add_row(
            _case(row),
            row.what,
            "" if row.seconds is None else duration(row.seconds) + _calm(row),
            rate(row),
            f"{fraction}\n[dim]{row.limit}[/dim]" if fraction else "",
            "\n".join([*peers, *filter(None, [row.note])]),
            f"{max(row.errors.values(), default=0.0):.0%}\n[dim]of allowed[/dim]",
        )
    return made


def _case(row: Row) -> str:
    return f"[bold]{row.operator}[/bold]\n{escape(row.case)}\n[dim]{escape(row.implementation)}[/dim]"


def _calm(row: Row) -> str:
    notes = [f"{row.faults:.0f} faults"] if row.faults and row.faults >= 1 else []
    if row.disturbed and row.disturbed > 0.5:
        notes.append(f"{row.disturbed:.0%} disturbed")
    return "".join(f"\n[dim]{note}[/dim]" for note in notes)


def _peer(name: str, peer: Peer) -> str:
    memory = "" if peer.memory_mib is None else f", +{peer.memory_mib:.0f} MiB"
    if peer.seconds is not None and peer.ratio is None:
        error = "" if peer.error is None else f"{peer.error:.3g} × the allowed error"
        return f"[yellow]{name}: {duration(peer.seconds)} for a wrong result: {error}{memory}[/yellow]"
    if peer.seconds is None or peer.ratio is None:
        return f"[dim]{name}: {escape(str(peer.absent))}{memory}[/dim]"
    claim = f"; {peer.claim}, error {peer.error:.0%} of allowed" if peer.claim and peer.error is not None else ""
    return f"{name}: {duration(peer.seconds)} ({peer.ratio:.2f} ×{memory}{claim})"


def duration(seconds: float) -> str:
    """Three figures in the unit that fits."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if abs(seconds) * factor >= 1 or unit == "µs":
            return (
                f"{seconds * factor:.3g} {unit}" if abs(seconds) * factor < 1000 else f"{seconds * factor:.0f} {unit}"
            )
    raise AssertionError("unreachable")


def rate(row: Row) -> str:
    if row.rate is None:
        return ""
    return f"{row.rate / 1e9:.1f} {_UNITS[row.unit]}" if row.unit in _UNITS else f"{row.rate:,.0f} {row.unit}/s"


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """``{"machine": …, "rows": […]}``; every row of a run was measured on the same machine."""
    listed = [asdict(row) for row in rows]
    for row in listed:
        del row["machine"]
    return {"machine": asdict(rows[0].machine) if rows else None, "rows": listed}


def write_json(rows: Sequence[Row], path: Path) -> None:
    write(path, as_json(rows))


def write(path: Path, value: Any) -> None:
    """JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(path)


def comparison(rows: Sequence[Comparison], revision: str) -> Table:
    """Two commits, one line for each row; the ratio is then over now, with the smallest and the largest round."""
    made = Table(title=f"against {revision}: above 1 this tree is faster", title_justify="left")
    for name in ("case", "what", revision, "this tree", "ratio", "rounds", ""):
        made.add_column(name, justify="left" if name in ("case", "what") else "right")
    colours = {"faster": "green", "slower": "red"}
    for row in rows:
        times = (duration(statistics.median(side)) if side else "" for side in (row.then, row.now))
        ratios = row.ratios
        spread = f"{min(ratios):.2f}–{max(ratios):.2f}" if ratios else ""
        colour = colours.get(row.verdict, "dim")
        middle = f"{statistics.median(ratios):.2f} ×" if ratios else ""
        case = f"[bold]{row.operator}[/bold] {escape(row.case)}"
        made.add_row(case, row.what, *times, middle, spread, f"[{colour}]{row.verdict}[/{colour}]")
    return made

"""Reports for a terminal, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from m4ov.checkpoints.comparison import Comparison
from m4ov.checkpoints.conversion import Result
from m4ov.checkpoints.inspection import Report

_SHOWN = 20  # rows of a table of weights


def _table(*columns: str, title: str | None = None) -> Table:
    """Names that end in a colon stand on the left, numbers on the right."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in columns:
        table.add_column(name.rstrip(":"), justify="left" if name.endswith(":") else "right", overflow="fold")
    return table


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def report_json(report: Report) -> dict[str, Any]:
    """Everything that ``m4ov checkpoint inspect`` found."""
    return asdict(report) | {"ok": report.ok}


def print_report(report: Report, console: Console) -> None:
    """The same for a terminal: products of one shape and scheme in one row."""
    formats = ", ".join(f"{count} × {name}" for name, count in report.formats.items()) or "nothing quantised"
    console.print(escape(f"{report.folder}: {report.tensors} tensors, {_size(report.nbytes)}: {formats}"))
    for name, convention in report.conventions.items():
        console.print(escape(f"{name}: {convention}"))
    table = _table("linears:", "quantised", "", "in 16 bits or more", "", title=None)
    for part, counts in report.linears.items():
        if counts["quantised"] or counts["left"]:
            table.add_row(
                part,
                str(counts["quantised"]),
                _size(counts["quantised_bytes"]),
                str(counts["left"]),
                _size(counts["left_bytes"]),
            )
    console.print(table)
    _print_products(report, console)
    for finding in report.findings:
        style = {"error": "red", "warning": "yellow"}.get(finding.level, "dim")
        console.print(f"[{style}]{finding.level}[/]: {escape(finding.message)}")


def _print_products(report: Report, console: Console) -> None:
    rows: dict[tuple[str, ...], int] = {}
    for product in report.products:
        own = product.name.rpartition(".")[2]
        takes = [f"✓ {name}" for name, reason in product.kernels.items() if reason is None]
        takes += [f"✗ {name}: {reason}" for name, reason in product.kernels.items() if reason is not None]
        N, K = product.shape
        key = (f"{product.part} {own}", f"{N} × {K}", product.scheme, "\n".join(takes))
        rows[key] = rows.get(key, 0) + 1
    if not rows:
        return
    ranks = f", each of {report.ranks} ranks" if report.ranks > 1 else ""
    table = _table("product:", "count", "N × K", "scheme:", "kernels:", title=f"what a server multiplies with{ranks}")
    for (name, shape, scheme, takes_it), count in rows.items():
        table.add_row(escape(name), str(count), shape, scheme, escape(takes_it))
    console.print(table)


def result_json(result: Result) -> dict[str, Any]:
    return asdict(result)


def print_result(result: Result, console: Console) -> None:
    """What ``m4ov checkpoint convert`` did."""
    console.print(escape(f"{result.out}: {result.format}, {_size(result.nbytes)}"))
    console.print(f"exact: {len(result.exact)} weights, every value")
    for title, rows in (("rounded", result.rounded), ("dequantised", result.plain)):
        _print_some(title, rows, console)
    for note in result.notes:
        console.print(escape(note))


def _print_some(title: str, rows: Mapping[str, float | str], console: Console) -> None:
    if not rows:
        return
    numbers = all(isinstance(value, float) for value in rows.values())
    worst = sorted(rows.items(), key=lambda row: row[1], reverse=True) if numbers else list(rows.items())
    table = _table(f"{title}:", "largest relative error" if numbers else "why:")
    for name, value in worst[:_SHOWN]:
        table.add_row(escape(name), f"{value:.2e}" if isinstance(value, float) else escape(value))
    console.print(table)
    if len(rows) > _SHOWN:
        console.print(f"and {len(rows) - _SHOWN} more; --json has all of them")


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    made = asdict(comparison) | {"ok": comparison.ok, "counts": comparison.counts}
    for row in made["rows"]:  # infinite, where A is nothing but zeros: no number in JSON
        if row["error"] is not None and not math.isfinite(row["error"]):
            row["error"] = None
    return made


def print_comparison(comparison: Comparison, console: Console) -> None:
    """What ``m4ov checkpoint verify`` found: the worst rows."""
    for note in comparison.notes:
        console.print(escape(note))
    told = ", ".join(f"{count} {verdict}" for verdict, count in comparison.counts.items())
    verdict = "alike" if len(comparison.digests) > 1 else "sound"
    console.print(f"{verdict if comparison.ok else f'not {verdict}'}: {told}")
    rows = [row for row in comparison.rows if row.verdict not in ("sound", "same", "equal")]
    rows.sort(key=lambda row: (row.verdict == "rounded", -(row.error or 0.0)))
    if rows:
        table = _table("weight:", "verdict:", "‖B − A‖/‖A‖", "max |B − A|", "detail:")
        for row in rows[:_SHOWN]:
            table.add_row(escape(row.name), row.verdict, _number(row.error), _number(row.largest), escape(row.detail))
        console.print(table)
        if len(rows) > _SHOWN:
            console.print(f"and {len(rows) - _SHOWN} more; --json has all of them")
    for which, digest in zip(("A", "B"), comparison.digests, strict=False):
        console.print(f"{which}: sha256 {digest}")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}"

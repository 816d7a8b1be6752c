"""The benchmark as a command: ``m4ov bench`` and ``python -m m4ov_bench`` end here; torch comes when it runs."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from m4ov_bench import runner
from m4ov_bench.row import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", nargs="*", help=f"which: {', '.join(runner.FAMILIES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="under a minute: main cases, no compiled peers, no memory")
    parser.add_argument(
        "--case", default="", metavar="TEXT", help="only cases whose name holds it, such as '4096] fp32'"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure there")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="PATH",
        help="draw ratios and rooflines by family, and memory, there (PATH-norm, …)",
    )
    parser.add_argument("--seed", type=int, help="of the inputs (default: fresh ones; the record names theirs)")
    parser.add_argument("--against", metavar="REV", help="compare this tree with a commit, by turns, and nothing else")
    parser.add_argument("--rounds", type=int, default=3, help="of --against (default: 3)")


def execute(arguments: argparse.Namespace, allocator: str = "") -> int:
    """Run, print a table for each family as it ends, write the files. Exit status 1 if any gate was red."""
    from rich.console import Console
    from rich.markup import escape

    from m4ov_bench import plots, report

    runner.check(arguments.family)
    for path in (arguments.json, arguments.plot):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)  # an unwritable place is found out before the run
    console = Console(width=None if sys.stdout.isatty() else 160)  # a file has no width of its own
    if arguments.against is not None:
        return _against(arguments, console)
    rows: list[Row] = []
    shown = 0
    with console.status("starting") as status:

        def say(text: str) -> None:
            status.update(text)

        options = (arguments.family, arguments.quick, say, allocator, arguments.case, arguments.seed)
        for row in runner.stream(*options, in_processes=len(arguments.family) != 1):
            if not rows:
                report.print_machine(row.machine, console)
            elif row.family != rows[-1].family:
                console.print(report.table(rows[shown:], rows[-1].family))
                shown = len(rows)
                if arguments.json is not None:  # kept, whatever becomes of the rest
                    report.write_json(rows, arguments.json)
            rows.append(row)
    if rows:
        console.print(report.table(rows[shown:], rows[-1].family))
    if arguments.json is not None:
        report.write_json(rows, arguments.json)
        console.print(f"figures: {arguments.json}")
    if arguments.plot is not None:
        for path in plots.write(rows, arguments.plot):
            console.print(f"plot: {path}")
    red = [row for row in rows if not row.green]
    for row in red:
        console.print(f"[red]red gate, no speed: {row.operator} {escape(row.case)}: {escape(row.problem)}[/red]")
    return 1 if red else 0


def _against(arguments: argparse.Namespace, console: Any) -> int:
    """Two commits by turns. Exit status 0 whichever is faster: a speed is for people to judge."""
    from m4ov_bench import against, report

    with console.status("starting") as status:
        found = against.compare(
            arguments.against, arguments.family, arguments.quick, arguments.rounds, status.update, arguments.case
        )
    console.print(report.comparison(found, arguments.against))
    if arguments.json is not None:
        report.write(arguments.json, [asdict(row) | {"verdict": row.verdict} for row in found])
        console.print(f"figures: {arguments.json}")
    return 0

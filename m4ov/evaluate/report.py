"""The page that tells what a run did: one HTML file that needs nothing else, and the same as a table."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment
from PIL import Image
from rich.console import Console
from rich.table import Table

from m4ov.evaluate import plots
from m4ov.evaluate.accuracy import Accuracy
from m4ov.evaluate.examples import Example


@dataclass(frozen=True)
class SideBySide:
    """Steps with and without the patch, as numbers: seconds and losses of each step, peak memory in MiB."""

    patched_seconds: tuple[float, ...]
    unpatched_seconds: tuple[float, ...]
    patched_step: float
    unpatched_step: float
    patched_peak_mib: float | None
    unpatched_peak_mib: float | None
    loss_differences: tuple[float, ...]
    samples: int
    tokens: int
    patch: str

    @property
    def speedup(self) -> float:
        return self.unpatched_step / self.patched_step

    @property
    def largest_loss_difference(self) -> float:
        return max(abs(difference) for difference in self.loss_differences)


@dataclass(frozen=True)
class Section:
    """A heading with a table, a figure, or both.

    Attributes:
        columns, rows: of the table; without columns there is none.
        figure: an SVG, or HTML whose text is escaped (:mod:`m4ov.evaluate.viewer`); empty: none.
        note: below them.
        printed: whether the terminal shows the table too.
    """

    title: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    figure: str = ""
    note: str = ""
    printed: bool = True


@dataclass(frozen=True)
class Report:
    """All that the page shows; what is empty is left out.

    Attributes:
        title: of the page.
        facts: name → value, the first table.
        sections: what this run has to tell, before anything else.
        metrics: rows of ``metrics.jsonl``.
        accuracies: of each held-out split.
        examples: questions with answers.
        comparison: patched against unpatched.
        operators: rows of ``m4ov_bench`` as dictionaries.
        machine: what the operators were measured on, in words.
    """

    title: str
    facts: dict[str, str]
    metrics: Sequence[dict[str, Any]] = ()
    accuracies: Sequence[Accuracy] = ()
    examples: Sequence[Example] = ()
    comparison: SideBySide | None = None
    operators: Sequence[dict[str, Any]] = ()
    machine: str = ""
    sections: Sequence[Section] = ()


def html(report: Report) -> str:
    """The page."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["mib"] = lambda value: "not observable here" if value is None else f"{value:,.0f} MiB"
    source = (resources.files("m4ov.evaluate") / "report.html").read_text(encoding="utf-8")
    comparison = report.comparison
    return environment.from_string(source).render(
        report=report,
        loss_curve=plots.loss_curve(report.metrics) if report.metrics else "",
        accuracy_plot=plots.accuracies(report.accuracies) if report.accuracies else "",
        operator_plot=plots.operators(report.operators) if report.operators else "",
        step_plot=plots.steps(comparison.patched_seconds, comparison.unpatched_seconds) if comparison else "",
        pictures=[data_uri(example.image) for example in report.examples],
        note=accuracy_note(),
    )


def print_table(report: Report, console: Console) -> None:
    """The end of a run in the terminal."""
    table = Table(title=report.title, title_justify="left", show_header=False)
    for name, value in report.facts.items():
        table.add_row(name, value)
    table.add_section()
    for result in report.accuracies:
        table.add_row(
            f"[bold]{result.split}[/bold]: right answers", f"[bold]{result.value:.2%}[/bold] of {len(result.right):,}"
        )
        if len(result.kinds) > 1:
            for kind, (right, asked) in result.kinds.items():
                table.add_row(f"  {kind}", f"{right / asked:.1%} of {asked:,}")
    if report.comparison is not None:
        _compared(report.comparison, table)
    console.print(table)
    for section in report.sections:
        if section.columns and section.printed:
            shown = Table(*section.columns, title=section.title, title_justify="left")
            for row in section.rows:
                shown.add_row(*row)
            console.print(shown)


def _compared(comparison: SideBySide, table: Table) -> None:
    table.add_section()
    peaks = [_mib(comparison.patched_peak_mib), _mib(comparison.unpatched_peak_mib)]
    table.add_row(
        f"step of {comparison.tokens:,} tokens, patched / unpatched",
        f"{1e3 * comparison.patched_step:.0f} / {1e3 * comparison.unpatched_step:.0f} ms "
        f"([bold]{comparison.speedup:.2f} ×[/bold])",
    )
    table.add_row("peak memory, patched / unpatched", f"{peaks[0]} / {peaks[1]}")
    table.add_row(
        f"largest loss difference in {len(comparison.loss_differences)} steps",
        f"{comparison.largest_loss_difference:.2g}",
    )


def accuracy_note() -> str:
    """How the answers were judged, for readers."""
    return (
        "An answer is right if greedy decoding gives exactly the true answer and then ends. This is read off one "
        "forward with the true answer fed in: greedy decoding gives it exactly if and only if the most likely token "
        "is the true one at every place, the end token included."
    )


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f} MiB"


def data_uri(image: np.ndarray) -> str:
    """uint8 ``[H, W, 3]`` as a PNG that needs no file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

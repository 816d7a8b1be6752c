"""The report's plots, each an SVG that needs nothing outside the page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from m4ov.evaluate.accuracy import Accuracy

_OURS, _OTHER, _GREY = "#2a6f97", "#bc4749", "#8d99ae"


def loss_curve(rows: Sequence[dict[str, Any]]) -> str:
    """Training loss over steps, from the rows of ``metrics.jsonl``."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], color=_OURS, linewidth=1.2)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    return _svg(figure)


def accuracies(results: Sequence[Accuracy]) -> str:
    """Share of right answers by type of question."""
    bars = [
        (f"{result.split}: {kind}", right / asked)
        for result in results
        for kind, (right, asked) in result.kinds.items()
    ]
    figure = Figure(figsize=(7, 0.6 + 0.36 * len(bars)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(range(len(bars)), [value for _, value in bars], color=_OURS)
    axes.bar_label(drawn, [f"{value:.1%}" for _, value in bars], padding=3)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("share of right answers")
    axes.invert_yaxis()
    return _svg(figure)


def operators(rows: Sequence[dict[str, Any]]) -> str:
    """Times of operators beside the least time that this machine allows; rows as ``m4ov_bench`` gives them."""
    kept = [row for row in rows if row.get("seconds") and row.get("limit_seconds")]
    figure = Figure(figsize=(7, 0.9 + 0.5 * len(kept)), layout="constrained")
    axes = figure.subplots()
    places = range(len(kept))
    axes.barh(
        [place - 0.2 for place in places], [row["seconds"] * 1e3 for row in kept], 0.38, color=_OURS, label="m4ov"
    )
    limits = [row["limit_seconds"] * 1e3 for row in kept]
    axes.barh([place + 0.2 for place in places], limits, 0.38, color=_GREY, label="limit, measured in the same run")
    axes.set_yticks(list(places), [f"{row['operator']} {row['case']}, {row['what']}" for row in kept], fontsize=8)
    axes.set_xlabel("milliseconds")
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    return _svg(figure)


def steps(patched: Sequence[float], unpatched: Sequence[float]) -> str:
    """Seconds of each step, patched and not."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    numbers = range(1, len(patched) + 1)
    axes.plot(numbers, [1e3 * value for value in unpatched], "o-", color=_OTHER, label="unpatched", markersize=4)
    axes.plot(numbers, [1e3 * value for value in patched], "o-", color=_OURS, label="patched", markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("milliseconds")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]

"""The report's plots, each an SVG that needs nothing outside the page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from m4ov.evaluate.accuracy import Accuracy

_OURS, _OTHER, _GREY = "#2a6f97", "#bc4749", "#8d99ae"
_PALETTE = (_OURS, "#e09f3e", _OTHER, "#2d6a4f", "#7b2cbf", _GREY)


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


def arms(shares: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Bars of final figures: arm → skill → share of right answers in each run; the mark is the range over runs."""
    skills = list(dict.fromkeys(skill for found in shares.values() for skill in found))
    figure = Figure(figsize=(7, 0.9 + 0.34 * len(shares) * len(skills)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(1, len(skills))
    for number, skill in enumerate(skills):
        values = [found[skill] for found in shares.values()]
        means = [sum(value) / len(value) for value in values]
        places = [place + (number - (len(skills) - 1) / 2) * height for place in range(len(shares))]
        ranges = [
            [mean - min(value) for mean, value in zip(means, values, strict=True)],
            [max(value) - mean for mean, value in zip(means, values, strict=True)],
        ]
        drawn = axes.barh(places, means, 0.92 * height, color=_PALETTE[number % len(_PALETTE)], label=skill)
        axes.errorbar(means, places, xerr=ranges, fmt="none", ecolor="#1d2733", capsize=2, linewidth=1)
        axes.bar_label(drawn, [f"{mean:.1%}" for mean in means], padding=10, fontsize=8)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.set_xlim(0, 1.15)
    axes.set_xlabel("share of right answers")
    axes.invert_yaxis()
    figure.legend(fontsize=8, loc="outside upper right", ncols=len(skills))
    return _svg(figure)


def courses(figures: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]]) -> str:
    """How skills went: arm → (step, skill → share) after each round; a panel for each skill."""
    skills = list(dict.fromkeys(skill for rows in figures.values() for _, found in rows for skill in found))
    figure = Figure(figsize=(7, 2.6 * len(skills)), layout="constrained")
    panels = figure.subplots(len(skills), 1, squeeze=False)[:, 0]
    for axes, skill in zip(panels, skills, strict=True):
        for number, (arm, rows) in enumerate(figures.items()):
            color = _PALETTE[number % len(_PALETTE)]
            axes.plot(
                [step for step, _ in rows],
                [found[skill] for _, found in rows],
                "o-",
                label=arm,
                color=color,
                markersize=3,
            )
        axes.set_ylabel(f"{skill}: right answers")
        axes.set_ylim(0, 1.03)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("step of the arm")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside upper right", ncols=len(figures))
    return _svg(figure)


def curves(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> str:
    """How numbers went: what it is → arm → (step, value); a panel for each, two in a row."""
    arms = list(dict.fromkeys(arm for found in panels.values() for arm in found))
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(9, 2.3 * rows + 0.4), layout="constrained")
    places = figure.subplots(rows, 2, squeeze=False).flatten().tolist()
    for axes, (title, found) in zip(places, panels.items(), strict=False):
        for arm, values in found.items():
            steps, numbers = zip(*values, strict=True)
            color = _PALETTE[arms.index(arm) % len(_PALETTE)]
            axes.plot(steps, numbers, color=color, linewidth=1.1, label=arm)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    lines = {line.get_label(): line for axes in places for line in axes.get_lines()}
    figure.legend([lines[arm] for arm in arms], arms, fontsize=8, loc="outside upper right", ncols=len(arms))
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]

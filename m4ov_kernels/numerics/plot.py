"""The certificate's picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from m4ov_kernels.numerics.certificate import Certificate, Group

_MEAN, _MAX, _LOW, _HIGH = "#2a6f97", "#bc4749", "#6a994e", "#e07a1f"


def draw(certificate: Certificate) -> Figure:
    """|Δ log-prob| and the share of tokens that would be clipped: over positions, and by class if there are classes."""
    parts = [("position in the sequence", certificate.positions), ("class of token", certificate.classes)]
    parts = [(title, groups) for title, groups in parts if groups]
    figure = Figure(figsize=(6.5 * len(parts), 6), layout="constrained")
    figure.suptitle(certificate.verdict().split("\n")[0], fontsize=8, wrap=True)
    axes = figure.subplots(2, len(parts), squeeze=False)
    for column, (title, groups) in enumerate(parts):
        above, below = axes[0][column], axes[1][column]
        _bars(above, groups, {"mean": ("mean_abs", _MEAN), "max": ("max_abs", _MAX)}, "|Δ log-prob|, nats")
        low, high = f"ratio below {1 - certificate.clip_low:g}", f"above {1 + certificate.clip_high:g}"
        series = {low: ("clipped_low", _LOW), high: ("clipped_high", _HIGH)}
        _bars(below, groups, series, "share that would be clipped")
        below.set_xlabel(title)
        values = [getattr(group, name) for group in groups for name in ("mean_abs", "max_abs")]
        positive = [value for value in values if 0 < value < math.inf]
        if positive:
            above.set_yscale("log")
            above.set_ylim(bottom=min(positive) / 4)
        below.set_ylim(0, max(0.01, below.get_ylim()[1]))
        above.legend(fontsize=8)
        below.legend(fontsize=8)
    return figure


def _bars(axes: Any, groups: Sequence[Group], series: dict[str, tuple[str, str]], label: str) -> None:
    for number, (name, (field, colour)) in enumerate(series.items()):
        values = [getattr(group, field) for group in groups]
        drawn = [value if math.isfinite(value) else 0.0 for value in values]
        bars = axes.bar(
            [place + 0.4 * number - 0.2 for place in range(len(groups))], drawn, 0.4, color=colour, label=name
        )
        axes.bar_label(bars, ["∞" if value == math.inf else "" for value in values])
    axes.set_xticks(range(len(groups)), [f"{group.name}\n{group.tokens:,}" for group in groups], fontsize=7)
    axes.set_ylabel(label)
    axes.grid(axis="y", linewidth=0.3)

"""Pictures of label trees and their coverage, for reports."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from m4ov.data.labels.coverage import Coverage, leaf_counts
from m4ov.data.labels.tree import LabelTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EMPTY = "#e3e3e3"
_SHORT = 20  # characters of a title that a ring has room for
_GOLDEN = 0.61803398875  # successive hues lie far apart


def sunburst(tree: LabelTree, counts: Mapping[str, int], *, title: str = "", format: str = "svg") -> bytes:
    """A tree as rings, the broadest innermost; a leaf's angle grows with its count, and grey ones have none.

    An empty leaf still gets a tenth of an equal share of the circle, added to every leaf, so that holes are seen.

    Args:
        counts: of leaves; those not named have none.
        format: ``"svg"`` or ``"png"``.

    Returns:
        The file; equal arguments give equal bytes.

    Raises:
        LabelError: a count is of no leaf, or negative.
        ModuleNotFoundError: matplotlib is not installed.
    """
    values = leaf_counts(tree, counts)
    total = sum(values.values())
    floor = 0.1 * total / len(values) if total else 1.0
    figure = _figure((8.5, 8.5))
    axes: Any = figure.add_subplot(projection="polar")
    axes.set_axis_off()
    axes.set_theta_direction(-1)
    axes.set_theta_zero_location("N")
    full = total + floor * len(values)
    begin: dict[str, float] = {}
    width: dict[str, float] = {}
    held: dict[str, int] = {}
    at = 0.0
    for leaf, count in values.items():
        share = 2 * np.pi * (count + floor) / full
        for id in tree.path(leaf):
            begin.setdefault(id, at)
            width[id] = width.get(id, 0.0) + share
            held[id] = held.get(id, 0) + count
        at += share
    hues = {label.id: place * _GOLDEN % 1 for place, label in enumerate(tree.children())}
    for id, start in begin.items():
        path = tree.path(id)
        level = len(path)
        colour = _colour(hues[path[0]], level) if held[id] else _EMPTY
        axes.bar(start, 1, width[id], bottom=level, align="edge", color=colour, edgecolor="white", linewidth=0.6)
        _write(axes, tree[id].title, held[id], start + width[id] / 2, level + 0.5, width[id] * (level + 0.5))
    axes.set_ylim(0, tree.levels + 1)
    axes.text(0, 0, f"{tree.name}\n{total}", ha="center", va="center", fontsize=11, parse_math=False)
    if title:
        axes.set_title(title, parse_math=False)
    return _bytes(figure, format)


def coverage_map(found: Coverage, *, level: int = 1, title: str = "", format: str = "svg") -> bytes:
    """Counts of topics (rows) × capabilities (columns) at one level; empty cells are grey, shades are logarithmic.

    Args:
        format: ``"svg"`` or ``"png"``.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    counts = found.at_level(level)
    rows = [found.topics[id].title for id in found.topics.at_level(level)]
    columns = [found.capabilities[id].title for id in found.capabilities.at_level(level)]
    figure = _figure((3.2 + 0.7 * len(columns), 1.8 + 0.36 * len(rows)))
    axes: Any = figure.subplots()
    axes.set_facecolor(_EMPTY)
    shades = np.ma.masked_equal(np.log1p(counts.astype(np.float64)), 0)
    axes.imshow(shades, cmap="Blues", vmin=0, vmax=max(1.0, float(np.log1p(counts.max()))) * 1.4, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=8, parse_math=False)
    axes.set_yticks(range(len(rows)), rows, fontsize=8, parse_math=False)
    if counts.size <= 400:
        for row, column in np.argwhere(counts).tolist():
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7)
    if title:
        axes.set_title(title, parse_math=False)
    return _bytes(figure, format)


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ModuleNotFoundError("pictures need matplotlib; pip install 'm4ov[data]'") from None
    return Figure(figsize=size, layout="constrained")


def _bytes(figure: Figure, format: str) -> bytes:
    from matplotlib import rc_context

    if format not in ("svg", "png"):
        raise ValueError(f"format: expected svg or png, got {format!r}")
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "m4ov"}):  # else ids in the SVG are random
        figure.savefig(buffer, format=format, dpi=110, metadata={"Date": None} if format == "svg" else None)
    return buffer.getvalue()


def _colour(hue: float, level: int) -> tuple[float, float, float]:
    import colorsys

    return colorsys.hls_to_rgb(hue, min(0.5 + 0.12 * (level - 1), 0.85), 0.55)


def _write(axes: Any, title: str, count: int, angle: float, radius: float, arc: float) -> None:
    """A title along the radius, never upside down, in as many lines as the ring has room for, two at most."""
    if arc < 0.11:
        return
    lines = textwrap.wrap(title, _SHORT, max_lines=2 if arc > 0.3 else 1, placeholder="…")
    degrees = 90 - np.degrees(angle)  # 0 at the right, as text is turned
    if not -90 <= (degrees + 180) % 360 - 180 <= 90:
        degrees += 180
    axes.text(
        angle,
        radius,
        "\n".join(lines),
        rotation=degrees,
        ha="center",
        va="center",
        fontsize=6,
        parse_math=False,  # a title may have a dollar sign
        color="black" if count else "#777777",
    )

"""Plots of a run, for people: how near to the machine's limit, how much faster than whom, how much memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m4ov_bench.row import Machine, Row

_OURS, _LINE = "#2a6f97", "#495057"
_COLOURS = (
    "#2a6f97",
    "#e07a1f",
    "#7b2cbf",
    "#2d6a4f",
    "#c1121f",
    "#6c757d",
    "#bc6c25",
    "#577590",
    "#e5989b",
    "#90be6d",
)
MEMORY = "memory"  # `what` of rows that hold nothing but the memory of a call


def write(rows: Sequence[Row], path: Path) -> list[Path]:
    """For each family ``PATH-<family>`` (ratios to peers) and ``PATH-<family>-roofline``, and ``PATH-memory``: where
    there is something to draw."""
    path.parent.mkdir(parents=True, exist_ok=True)
    families = dict.fromkeys(row.family for row in rows)
    figures = {"-memory": memory(rows)}
    for family in families:
        own = [row for row in rows if row.family == family]
        figures |= {f"-{family}": ratios(own), f"-{family}-roofline": roofline(own)}
    made = []
    for suffix, figure in figures.items():
        if figure is not None:
            made.append(path.with_name(f"{path.stem}{suffix}{path.suffix}"))
            figure.savefig(made[-1], dpi=120)
    return made


def ratios(rows: Sequence[Row]) -> Any:
    """How much longer each peer takes as called: a group of bars for each row, a colour for each peer; ``None`` without
    peers."""
    groups = [(row, peers) for row in rows if (peers := _believed(row))]
    if not groups:
        return None
    names = list(dict.fromkeys(name for _, peers in groups for name in peers))
    colours = dict(zip(names, itertools.cycle(_COLOURS), strict=False))
    place, ticks, labels = 0.0, [], []
    bars: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for row, peers in groups:
        ticks.append(place + (len(peers) - 1) / 2)
        labels.append(f"{row.operator} {row.case}\n{row.what.removesuffix(', as called')}")
        for name, ratio in peers.items():
            bars[name].append((place, ratio))
            place += 1.0
        place += 1.0
    figure, axes = _figure(11, 1.6 + 0.13 * place, rows[0].machine)
    for name, points in bars.items():
        places, lengths = zip(*points, strict=True)
        axes.barh(places, lengths, color=colours[name], height=0.9, label=name)
        for height, length in points:
            axes.text(max(length, 1.0), height, f" {length:.2f}", va="center", fontsize=6)
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    lengths = [ratio for _, peers in groups for ratio in peers.values()]
    axes.set_xlim(min(0.5, *lengths) * 0.9, max(2.0, *lengths) * 1.6)
    axes.set_ylim(place, -1.0)
    axes.set_xlabel("time of the peer over ours, as called (right of 1: ours is faster)")
    figure.legend(loc="outside lower center", fontsize=7, ncols=6)
    return figure


def _believed(row: Row) -> dict[str, float]:
    return {name: peer.ratio for name, peer in row.peers.items() if peer.ratio}


def roofline(rows: Sequence[Row]) -> Any:
    """Each kernel's FLOP/s over its FLOPs per byte, below the limits that were measured in the same run; numbered, with
    the numbers' meaning beside."""
    kernels = [row for row in rows if row.bytes and row.flops and row.seconds]
    limits = rows[0].machine.limits if rows else {}
    copy = limits.get("copy B/s")
    peaks = {name.removesuffix(" mm FLOP/s"): rate for name, rate in limits.items() if name.endswith(" mm FLOP/s")}
    if any(row.unit == "OP" for row in kernels) and "int8 dot OP/s" in limits:
        peaks["int8 dot"] = limits["int8 dot OP/s"]
    if not kernels or not copy or not peaks:
        return None
    figure, axes = _figure(12, max(4.5, 1.2 + 0.17 * len(kernels)), rows[0].machine)
    points = [(row, row.flops / row.bytes, row.flops / row.seconds) for row in kernels]  # type: ignore[operator]
    first = min(0.1, *(x for _, x, _ in points)) / 2
    last = max(max(peaks.values()) / copy, *(x for _, x, _ in points)) * 4
    for name, peak in peaks.items():
        knee = peak / copy
        axes.plot([first, knee, last], [first * copy, peak, peak], color=_LINE, linewidth=1.0)
        axes.text(last, peak, f"{name} {peak / 1e9:.0f} GFLOP/s ", ha="right", va="bottom", fontsize=8, color=_LINE)
    axes.text(first, first * copy * 1.3, f" copy {copy / 1e9:.0f} GB/s", fontsize=8, color=_LINE)
    operators = list(dict.fromkeys(row.operator for row in kernels))
    for number, (row, x, y) in enumerate(points):
        colour = _COLOURS[operators.index(row.operator) % len(_COLOURS)]
        axes.plot(x, y, "o" if "fp32" not in row.case else "s", color=colour, markersize=6)
        axes.annotate(str(number + 1), (x, y), xytext=(5, -9), textcoords="offset points", fontsize=7, color=colour)
    listed = "\n".join(
        f"{number + 1}  {row.operator} {row.case}, {row.what.removesuffix(', kernel')}"
        + (f": {row.fraction:.0%}" if row.fraction is not None else "")
        for number, (row, *_) in enumerate(points)
    )
    axes.text(1.02, 1.0, listed, transform=axes.transAxes, va="top", fontsize=7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte that must move (caches may move fewer)")
    axes.set_ylabel("FLOP/s")
    axes.set_title("kernels under the machine's limits; %: of the limit interleaved with each", fontsize=9)
    axes.grid(True, which="major", linewidth=0.3)
    return figure


def memory(rows: Sequence[Row]) -> Any:
    """MiB beyond inputs and outputs over the number of tokens; ``None`` if nothing was measured."""
    found: dict[str, list[tuple[int, float]]] = {}
    measured = [row for row in rows if row.what.startswith(MEMORY) and row.tokens]
    for row in measured:
        values = {"m4ov": row.memory_mib} | {name: peer.memory_mib for name, peer in row.peers.items()}
        for name, value in values.items():
            if value is not None:
                found.setdefault(name, []).append((row.tokens or 0, value))
    if not found:
        return None
    figure, axes = _figure(8, 5, rows[0].machine)
    for name, points in found.items():
        ours = name.startswith("m4ov")
        axes.plot(
            *zip(*sorted(points), strict=True), "o-", label=name, color=None if not ours else _OURS, lw=2 if ours else 1
        )
    axes.set_xlabel("tokens with a label")
    axes.set_ylabel("MiB beyond inputs and outputs, forward + backward")
    axes.set_title(f"{measured[0].operator}, {measured[0].case}", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    axes.grid(True, linewidth=0.3)
    return figure


def _figure(width: float, height: float, machine: Machine) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{machine.cpu}, {machine.threads} threads, {machine.isa}, {machine.date}", fontsize=8)
    return figure, figure.subplots()

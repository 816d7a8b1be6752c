"""Plots of a run, for people: how near to the machine's limit, how much faster than whom, how much memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m4ov_bench.row import Machine, Peer, Row

_OURS, _SLOWER, _FASTER, _LINE = "#2a6f97", "#bc4749", "#6a994e", "#495057"
_FAMILIES = ("#2a6f97", "#e07a1f", "#7b2cbf", "#2d6a4f", "#c1121f", "#6c757d")
MEMORY = "memory"  # `what` of rows that hold nothing but the memory of a call


def write(rows: Sequence[Row], path: Path) -> list[Path]:
    """``PATH``: ratios to peers; ``PATH-roofline``, ``PATH-memory``: where there is something to draw."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = []
    for suffix, draw in (("", ratios), ("-roofline", roofline), ("-memory", memory)):
        figure = draw(rows)
        if figure is not None:
            made.append(path.with_name(f"{path.stem}{suffix}{path.suffix}"))
            figure.savefig(made[-1], dpi=120)
    return made


def ratios(rows: Sequence[Row]) -> Any:
    """How much longer each peer takes as called, one group of bars for each row; ``None`` without peers."""
    groups = [(row, _believed(row)) for row in rows if _believed(row)]
    if not groups:
        return None
    places, lengths, labels, ticks, titles = [], [], [], [], []
    place = 0.0
    for row, peers in groups:
        titles.append((place, f"{row.operator} {row.case}: {row.what.removesuffix(', as called')}"))
        place += 1.0
        for name, peer in peers:
            places.append(place)
            lengths.append(peer.ratio or 0.0)
            labels.append(f" {peer.ratio:.2f} ×")
            ticks.append(name)
            place += 1.0
        place += 0.6
    figure, axes = _figure(11, 1.4 + 0.21 * place, rows[0].machine)
    axes.barh(places, lengths, color=[_SLOWER if length < 1 else _FASTER for length in lengths], height=0.8)
    for height, length, label in zip(places, lengths, labels, strict=True):
        axes.text(max(length, 1.0), height, label, va="center", fontsize=7)
    axes.set_yticks(places, ticks, fontsize=7)
    for height, title in titles:
        axes.text(0.0, height, title, transform=axes.get_yaxis_transform(), va="center", fontsize=8, weight="bold")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, *lengths) * 0.9, max(2.0, *lengths) * 1.6)
    axes.set_ylim(place, -1.0)
    axes.set_xlabel("time of the peer over ours, as called (above 1: ours is faster)")
    return figure


def _believed(row: Row) -> list[tuple[str, Peer]]:
    return [(name, peer) for name, peer in row.peers.items() if peer.ratio]


def roofline(rows: Sequence[Row]) -> Any:
    """Each kernel's FLOP/s over its FLOPs per byte, below the limits that were measured in the same run."""
    kernels = [row for row in rows if row.bytes and row.flops and row.seconds]
    limits = rows[0].machine.limits if rows else {}
    copy = limits.get("copy B/s")
    peaks = {name.removesuffix(" mm FLOP/s"): rate for name, rate in limits.items() if name.endswith(" mm FLOP/s")}
    if not kernels or not copy or not peaks:
        return None
    figure, axes = _figure(9, 6.5, rows[0].machine)
    points = [(row, row.flops / row.bytes, row.flops / row.seconds) for row in kernels]  # type: ignore[operator]
    first = min(0.1, *(x for _, x, _ in points)) / 2
    last = max(max(peaks.values()) / copy, *(x for _, x, _ in points)) * 4
    for name, peak in peaks.items():
        knee = peak / copy
        axes.plot([first, knee, last], [first * copy, peak, peak], color=_LINE, linewidth=1.0)
        axes.text(last, peak, f"{name} {peak / 1e9:.0f} GFLOP/s ", ha="right", va="bottom", fontsize=8, color=_LINE)
    axes.text(first, first * copy * 1.3, f" copy {copy / 1e9:.0f} GB/s", fontsize=8, color=_LINE)
    families = list(dict.fromkeys(row.family for row in kernels))
    for number, (row, x, y) in enumerate(points):
        colour = _FAMILIES[families.index(row.family) % len(_FAMILIES)]
        axes.plot(x, y, "o" if "fp32" not in row.case else "s", color=colour, markersize=6)
        axes.annotate(str(number + 1), (x, y), xytext=(5, -9), textcoords="offset points", fontsize=7, color=colour)
    listed = "\n".join(
        f"{number + 1}  {row.operator} {row.case}, {row.what.removesuffix(', kernel')}"
        + (f": {row.fraction:.0%}" if row.fraction is not None else "")
        for number, (row, *_) in enumerate(points)
    )
    axes.text(1.01, 1.0, listed, transform=axes.transAxes, va="top", fontsize=7)
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

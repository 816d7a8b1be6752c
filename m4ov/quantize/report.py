"""What quantising did: layer by layer, and before and after."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from m4ov.quantize.calibration import Batch, run
from m4ov.quantize.checkpoint import tensors_of
from m4ov.quantize.flow import Result
from m4ov.quantize.plan import Layer, Options
from m4ov.quantize.schemes import SCHEMES
from m4ov_kernels.packing import PackedBatch


@dataclass(frozen=True)
class Side:
    """A checkpoint, before or after.

    Attributes:
        file_bytes: of its safetensors files.
        half_bytes: what those would be if what is wider were 16 bits.
        accuracy: split → share of right answers.
        loss: on the calibration batches; ``None`` without data.
        tokens_per_second: of forward passes over them, the median of several.
    """

    file_bytes: int
    half_bytes: int
    accuracy: Mapping[str, float] = field(default_factory=dict)
    loss: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Report:
    """Everything that ``m4ov quantize`` found, as ``as_json`` writes it."""

    options: Options
    result: Result
    before: Side
    after: Side
    threads: int

    def as_json(self) -> dict[str, Any]:
        options = asdict(self.options)
        options |= {"model": str(self.options.model), "out": str(self.options.out), "parts": sorted(self.options.parts)}
        return {
            "options": options,
            "format": SCHEMES[self.options.scheme].format,
            "threads": self.threads,
            "before": asdict(self.before),
            "after": asdict(self.after),
            "bits": bits(self.result.layers),
            "notes": list(self.result.notes),
            "layers": [asdict(layer) for layer in self.result.layers],
        }


def bits(layers: Sequence[Layer]) -> float:
    """Of a weight, on the average over the linears."""
    weights = [layer.shape[0] * layer.shape[1] for layer in layers]
    return sum(layer.bits * count for layer, count in zip(layers, weights, strict=True)) / sum(weights)


def file_bytes(folder: Path) -> int:
    """Of a checkpoint's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def half_bytes(folder: Path) -> int:
    """Of a checkpoint's tensors, if those wider than 16 bits had 16."""
    return sum(tensor.numel() * min(tensor.element_size(), 2) for tensor in tensors_of(folder).values())


@torch.no_grad()
def measure_side(
    model: Any, folder: Path, batches: Sequence[Batch], accuracy: Mapping[str, float], *, repeats: int = 3
) -> Side:
    """Loss and speed of a model on batches that it has seen once already."""
    sizes = file_bytes(folder), half_bytes(folder)
    if not batches:
        return Side(*sizes, accuracy)
    losses = [float(run(model, batch).loss) for batch in batches]
    tokens = sum(batch.tokens if isinstance(batch, PackedBatch) else batch["input_ids"].numel() for batch in batches)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        for batch in batches:
            run(model, batch)
        seconds.append(time.perf_counter() - began)
    return Side(*sizes, accuracy, sum(losses) / len(losses), tokens / statistics.median(seconds))


def print_report(report: Report, console: Console) -> None:
    """The same for a terminal."""
    options, result = report.options, report.result
    table = Table(
        title=f"{options.model} in {options.scheme} ({options.method})", title_justify="left", box=SIMPLE_HEAD
    )
    for name in ("linear", "bits", "weight off", "output off", "Δ loss", ""):
        table.add_column(
            name, justify="left" if name in ("linear", "") else "right", overflow="fold", no_wrap=bool(name)
        )
    for layer in result.layers:
        if layer.kept is not None and layer.kept.endswith("is not asked for"):
            continue
        remarks = [] if layer.kept is None else [f"kept: {layer.kept}"]
        remarks += ["scaled"] if layer.scaled else []
        remarks += ["slow*"] if layer.slow else []
        table.add_row(
            layer.name.removeprefix("model.").removeprefix("language_model."),
            f"{layer.bits:.2f}",
            _share(layer.weight_error),
            _share(layer.error),
            "–" if layer.loss_change is None else f"{layer.loss_change:+.1e}",
            "; ".join(remarks),
        )
    console.print(table)
    if any(layer.slow for layer in result.layers):
        gate = " and ".join(map(str, SCHEMES[options.scheme].gate))
        console.print(f"* engines' fast kernels want N and K in multiples of {gate}")
    console.print(summary(report))
    left: dict[str, int] = {}
    for layer in result.layers:
        if layer.kept is not None:
            left[layer.kept] = left.get(layer.kept, 0) + 1
    for reason, count in left.items():
        console.print(f"in 16 bits, {count} linear{'s' if count > 1 else ''}: {reason}")
    for note in result.notes:
        console.print(note)


def summary(report: Report) -> Table:
    """Before and after."""
    before, after = report.before, report.after
    table = Table(box=SIMPLE_HEAD)
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    wider = before.file_bytes > 1.5 * before.half_bytes
    whole = f" ({before.half_bytes / 1e6:,.2f} in 16 bits)" if wider else ""
    table.add_row("files, MB", f"{before.file_bytes / 1e6:,.2f}{whole}", f"{after.file_bytes / 1e6:,.2f}")
    table.add_row("bits a weight of the linears", "16.00", f"{bits(report.result.layers):.2f}")
    for split, value in before.accuracy.items():
        table.add_row(f"{split}: right answers", f"{value:.2%}", f"{after.accuracy[split]:.2%}")
    if before.loss is not None and after.loss is not None:
        table.add_row("loss on the calibration batches", f"{before.loss:.5f}", f"{after.loss:.5f}")
    if before.tokens_per_second and after.tokens_per_second:
        table.add_row(
            f"forward, tokens/s, {report.threads} threads",
            f"{before.tokens_per_second:,.0f}",
            f"{after.tokens_per_second:,.0f}",
        )
    return table


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"

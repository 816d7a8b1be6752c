"""What a loss says of its batches, gathered over a step: sums, means over tokens, extremes; then over all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

#: Metrics that are sums, divided by what the step's loss is divided by; others are means, weighted by ``weight``
#: (effective sample sizes too, which are of each batch by itself).
SUMS = (
    *("loss", "policy_loss", "kl_loss", "entropy_loss", "perception_loss"),
    *("dpo_loss", "bco_loss", "sft_loss"),
)
TOTALS = ("tokens", "sequences", "pairs")  # counts of the step
LARGEST, SMALLEST = ("ratio_max", "mismatch_max"), ("ratio_min",)


class Reducer(Protocol):
    """``World.reduce``."""

    def __call__(self, what: str, values: Sequence[float], *, largest: bool = False) -> list[float]: ...


class Window:
    """Metrics since the last time somebody looked. Nothing is fetched from a device before that."""

    def __init__(self) -> None:
        self._rows: list[tuple[dict[str, Tensor], float, float]] = []

    def add(self, metrics: Mapping[str, Tensor], *, count: float, weight: float) -> None:
        """Of a batch. ``count``: what its sums are to be divided by; ``weight``: tokens (or pairs) of its means."""
        self._rows.append(({name: value.detach() for name, value in metrics.items()}, float(count), float(weight)))

    def close(self, reduce: Reducer | None = None) -> dict[str, float]:
        """The step's metrics, and a new window. Collective with ``reduce``: every rank has called :meth:`add` with the
        same names since (a rank without a batch is not supported)."""
        rows, self._rows = self._rows, []
        names = sorted({name for metrics, _, _ in rows for name in metrics})
        extreme = [name for name in names if name in LARGEST + SMALLEST]
        plain = [name for name in names if name not in extreme]
        sums = [sum(count for _, count, _ in rows), sum(weight for _, _, weight in rows)]
        for name in plain:
            of = [(metrics[name], weight) for metrics, _, weight in rows if name in metrics]
            sums.append(sum(float(value) * (1.0 if name in SUMS + TOTALS else weight) for value, weight in of))
        peaks = [self._peak(name, rows) for name in extreme]
        if reduce is not None:
            sums = reduce("metrics", sums)
            peaks = reduce("metrics", peaks, largest=True) if peaks else peaks
        count, weight = max(sums[0], 1e-300), max(sums[1], 1e-300)
        over = dict.fromkeys(SUMS, count) | dict.fromkeys(TOTALS, 1.0)
        found = {name: value / over.get(name, weight) for name, value in zip(plain, sums[2:], strict=True)}
        for name, value in zip(extreme, peaks, strict=True):
            found[name] = -value if name in SMALLEST else value
        return found

    @staticmethod
    def _peak(name: str, rows: Sequence[tuple[dict[str, Tensor], float, float]]) -> float:
        values = [float(metrics[name]) for metrics, _, weight in rows if name in metrics and weight]
        if not values:
            return -float("inf")
        return -min(values) if name in SMALLEST else max(values)


def mean(values: Tensor | None) -> Tensor | None:
    """Of a batch's tokens; 0 of none."""
    if values is None:
        return None
    return values.float().mean() if values.numel() else torch.zeros((), device=values.device)

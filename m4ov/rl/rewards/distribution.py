"""What the values of a reward were like, and how often there was none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

#: Why an answer has no value of its own: the function raised; did not end in time; ended its process; gave NaN; gave a
#: value outside the declared range.
FAILURES = ("raised", "timed out", "died", "NaN", "out of range")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Distribution:
    """Of the values that training sees, those put in the place of failures among them.

    Attributes:
        quantiles: share → value, linear between values.
        failures: kind of :data:`FAILURES` → how many.
        messages: kind → what the first of them said.
    """

    count: int
    mean: float
    std: float
    min: float
    max: float
    quantiles: dict[float, float]
    failures: dict[str, int]
    messages: dict[str, str]

    @classmethod
    def of(cls, values: Sequence[float], failures: Sequence[str | None], messages: Sequence[str]) -> Distribution:
        """``failures`` and ``messages``: of each value; ``None`` and anything, where there was none."""
        count = len(values)
        mean = math.fsum(values) / count if count else 0.0
        square = math.fsum((value - mean) ** 2 for value in values) / count if count else 0.0
        ordered = sorted(values)
        said: dict[str, str] = {}
        for failure, message in zip(failures, messages, strict=True):
            if failure is not None:
                said.setdefault(failure, message)
        return cls(
            count=count,
            mean=mean,
            std=math.sqrt(square),
            min=ordered[0] if count else 0.0,
            max=ordered[-1] if count else 0.0,
            quantiles={share: _quantile(ordered, share) for share in QUANTILES},
            failures={kind: sum(failure == kind for failure in failures) for kind in FAILURES},
            messages=said,
        )

    @property
    def failed(self) -> int:
        return sum(self.failures.values())

    def as_json(self) -> dict[str, Any]:
        """Plain values; quantiles by their share as text."""
        return {**asdict(self), "quantiles": {f"{share:g}": value for share, value in self.quantiles.items()}}

    def text(self) -> str:
        """One line."""
        line = f"{self.count}: {self.mean:.4g} ± {self.std:.4g}, {self.min:.4g} to {self.max:.4g}"
        line += "".join(f", q{share * 100:g} {value:.4g}" for share, value in self.quantiles.items())
        failed = [f"{count} {kind}" for kind, count in self.failures.items() if count]
        return line + (f"; {', '.join(failed)}" if failed else "")


def _quantile(ordered: Sequence[float], share: float) -> float:
    if not ordered:
        return 0.0
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])

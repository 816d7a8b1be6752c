"""A score of an image, what it was counted from, and the line that an audit keeps of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m4ov.data.records import short
from m4ov.data.whole import write_whole

if TYPE_CHECKING:
    from m4ov.data.density.allot import Allotment

AXES = ("subjects", "spatial", "text", "knowledge")
_DIGITS = 6  # of a score; beyond them, two machines' last bits differ


class DensityError(ValueError):
    """An image, its metadata or a score cannot be used; the message names which and says why."""


@dataclass(frozen=True)
class Density:
    """The information density of an image; ``README.md`` in this folder has the formulas.

    Attributes:
        subjects: how many and how different things are shown.
        spatial: in how many relations they stand.
        text: how much is to be read.
        knowledge: how much is known beyond what is seen.
        combined: of the four (:func:`combine`). All are in [0, 1].
        evidence: ``scorer``, ``size`` (width, height), and for each axis what was counted and ``from`` what.
    """

    subjects: float
    spatial: float
    text: float
    knowledge: float
    combined: float
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*AXES, "combined"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise DensityError(f"{name}: expected a number in [0, 1], got {short(value)}")

    @classmethod
    def of(cls, axes: Mapping[str, float], evidence: Mapping[str, Any]) -> Density:
        """From the four axes, rounded to six digits."""
        rounded = {name: round(float(axes[name]), _DIGITS) for name in AXES}
        return cls(**rounded, combined=round(combine(rounded), _DIGITS), evidence=evidence)

    @property
    def axes(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in AXES}

    def to_json(self) -> dict[str, Any]:
        return {"scores": {**self.axes, "combined": self.combined}, "evidence": dict(self.evidence)}

    @classmethod
    def from_json(cls, value: Any) -> Density:
        """What :meth:`to_json` wrote; other names in ``value``, as an audit has them, are left alone.

        Raises:
            DensityError: scores are missing or no scores.
        """
        scores = value.get("scores") if isinstance(value, Mapping) else None
        if not isinstance(scores, Mapping) or set(scores) != {*AXES, "combined"}:
            raise DensityError(f"scores: expected {', '.join(AXES)} and combined, got {short(scores)}")
        evidence = value.get("evidence", {})
        if not isinstance(evidence, Mapping):
            raise DensityError(f"evidence: expected an object, got {short(evidence)}")
        return cls(**scores, evidence=evidence)


def combine(axes: Mapping[str, float]) -> float:
    """The quadratic mean of the four axes: an image that is rich in one is worth questions, one rich in all is worth
    more."""
    return math.sqrt(sum(axes[name] ** 2 for name in AXES) / len(AXES))


def saturated(amount: float, scale: float) -> float:
    """``1 - exp(-amount / scale)``: 0 for nothing, 63% at ``scale``, and never past 1."""
    return 0.0 - math.expm1(-amount / scale)  # 0.0 - …: never -0.0


def audit(id: str, density: Density, allotment: Allotment | None = None) -> dict[str, Any]:
    """An image's line in the audit: its scores, their evidence, and what it was allotted."""
    row = {"id": id, **density.to_json()}
    if allotment is not None:
        row["allotted"] = allotment.to_json()
    return row


def write_audits(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSONL of :func:`audit` rows, whole or not at all.

    Raises:
        WriteError: it cannot be written.
    """
    write_whole(path, "".join(f"{json.dumps(row, ensure_ascii=False, allow_nan=False)}\n" for row in rows))

"""Shares of right answers with Wilson's confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_Z = 1.959963984540054  # 95%, two-sided


@dataclass(frozen=True)
class Share:
    """A share of right answers.

    Attributes:
        value: in 0 to 1.
        count: answers that it rests on: as many independent ones as would make it as uncertain (see :func:`macro`).
    """

    value: float
    count: float

    def interval(self, z: float = _Z) -> tuple[float, float]:
        """Wilson's score interval (1927): of all shares p, those from which this one is at most ``z`` standard errors
        ``√(p(1 − p)/n)`` away."""
        middle = self.value + z * z / (2 * self.count)
        half = z * (self.value * (1 - self.value) / self.count + (z / (2 * self.count)) ** 2) ** 0.5
        scale = 1 + z * z / self.count
        return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.value:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def micro(right: Sequence[bool]) -> Share:
    """Of all answers alike.

    Raises:
        ValueError: there is none.
    """
    if not right:
        raise ValueError("micro: expected at least one answer, got none")
    return Share(sum(right) / len(right), len(right))


def macro(right: Mapping[str, Sequence[bool]]) -> Share:
    """The mean over K categories, each counted alike. Its variance is Σ p(1 − p)/n_k / K² where the categories' shares
    are one p (where they differ it is less, with Jensen), as that of K² / Σ 1/n_k answers: that is ``count``.

    Raises:
        ValueError: there is no category, or one without an answer.
    """
    if not right or not all(right.values()):
        raise ValueError(f"macro: expected answers in every category, got { ({k: len(v) for k, v in right.items()}) }")
    size = len(right)
    mean = sum(sum(answers) / len(answers) for answers in right.values()) / size
    return Share(mean, size * size / sum(1 / len(answers) for answers in right.values()))

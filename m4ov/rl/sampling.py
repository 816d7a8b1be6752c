"""Dynamic sampling: prompts whose answers are all alike teach nothing, and others take their places."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

G = TypeVar("G")


@dataclass(frozen=True)
class Sampled(Generic[G]):
    """What was drawn until there was enough. ``kept + surplus + dropped`` is all of it: nothing is lost.

    Attributes:
        kept: informative groups, at most as many as were wanted, in the order in which they came.
        surplus: informative groups beyond those: for a later step, if its losses correct for their age.
        dropped: groups that teach nothing.
        rounds: batches that were drawn.
        short: fewer were found than wanted.
    """

    kept: list[G]
    surplus: list[G]
    dropped: list[G]
    rounds: int
    short: bool

    @property
    def metrics(self) -> dict[str, float]:
        found = len(self.kept) + len(self.surplus) + len(self.dropped)
        return {
            "sampling_rounds": float(self.rounds),
            "sampling_kept": float(len(self.kept)),
            "sampling_surplus": float(len(self.surplus)),
            "sampling_dropped": len(self.dropped) / max(found, 1),
            "sampling_short": float(self.short),
        }


def informative(
    batches: Iterable[Iterable[G]], tells: Callable[[G], bool], *, wanted: int, most_rounds: int
) -> Sampled[G]:
    """Draw batches of groups until ``wanted`` of them tell answers apart (DAPO, arXiv 2503.14476).

    Args:
        batches: each one round of sampling; drawn only when it is needed.
        tells: whether a group is informative.
        wanted: how many are.
        most_rounds: batches at most: on data that is all too easy or too hard, a step is short, not endless.

    Raises:
        ValueError: ``wanted`` or ``most_rounds`` is below 1.
    """
    for name, value in (("wanted", wanted), ("most_rounds", most_rounds)):
        if value < 1:
            raise ValueError(f"informative: {name}: expected at least 1; got {value}")
    kept: list[G] = []
    dropped: list[G] = []
    rounds = 0
    source = iter(batches)
    while len(kept) < wanted and rounds < most_rounds:
        batch = next(source, None)
        if batch is None:
            break
        rounds += 1
        for group in batch:
            (kept if tells(group) else dropped).append(group)
    return Sampled(kept[:wanted], kept[wanted:], dropped, rounds, len(kept) < wanted)

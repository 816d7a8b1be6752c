"""What happens after a round: a pure function of the manifest and of measured figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from m4ov.data.shares import largest_remainder
from m4ov.manifest import GuardConfig, StageConfig

END, RAISE, CONTINUE, STOP = "end", "raise replay", "continue", "stop"


@dataclass(frozen=True)
class Decision:
    """What is done, and on which figures it rests.

    Attributes:
        action: ``"end"``: all targets hold and every guarded skill is within its epsilon, the stage is over;
            ``"raise replay"``: a guarded skill is not; ``"continue"``: all are, a target is missing (or there is none);
            ``"stop"``: neither is the gate open nor is there a round left.
        targets: skill → its share, what it must be, whether it is.
        guards: skill → its share, what it may not fall below, whether it holds.
        replay: skill → ratio of a step's images that are replayed for it from here.
    """

    action: str
    targets: dict[str, dict[str, Any]]
    guards: dict[str, dict[str, Any]]
    replay: dict[str, float]

    @property
    def over(self) -> bool:
        return self.action in (END, STOP)


def decide(
    stage: StageConfig,
    *,
    figures: Mapping[str, float],
    arm_start: Mapping[str, float],
    stage_start: Mapping[str, float],
    replay: Mapping[str, float],
    rounds_left: bool,
) -> Decision:
    """What to do after a round.

    Args:
        figures: skill → share of right answers now.
        arm_start, stage_start: the same, when the arm and when the stage began.
        replay: skill → ratio, during the round.
        rounds_left: whether the stage may have another one.
    """
    targets, guards = {}, {}
    for skill, target in stage.targets.items():
        needed = target.at_least or target.of_start * arm_start[skill]
        targets[skill] = {"is": figures[skill], "must be": needed, "holds": figures[skill] >= needed}
    for skill, guard in stage.guards.items():
        floor = max(arm_start[skill], stage_start[skill]) - float(guard.epsilon or 0.0)
        guards[skill] = {"is": figures[skill], "must be": floor, "holds": figures[skill] >= floor}
    kept = all(found["holds"] for found in guards.values())
    reached = bool(targets) and all(found["holds"] for found in targets.values())
    ratios = dict(replay)
    if kept and reached:
        action = END
    elif not rounds_left:
        action = STOP
    elif kept:
        action = CONTINUE
    else:
        action = RAISE
        for skill, found in guards.items():
            if not found["holds"]:
                ratios[skill] = raised(stage.guards[skill], ratios[skill])
    return Decision(action, targets, guards, ratios)


def raised(guard: GuardConfig, ratio: float) -> float:
    """The manifest's rule: ``min(most, factor · ratio + add)``."""
    return min(guard.most, guard.factor * ratio + guard.add)


def shares(stage: StageConfig, replay: Mapping[str, float]) -> dict[str, float]:
    """Pool → its share of a step's images; the sum is 1. What is not replayed is the mixture's, by its weights."""
    found = dict.fromkeys(stage.mixture, 0.0) | {guard.pool: 0.0 for guard in stage.guards.values()}
    rest, whole = 1.0 - sum(replay.values()), sum(stage.mixture.values())
    for pool, weight in stage.mixture.items():
        found[pool] += rest * weight / whole
    for skill, ratio in replay.items():
        found[stage.guards[skill].pool] += ratio
    return found


def counts(found: Mapping[str, float], images: int) -> dict[str, int]:
    """Shares as whole images, ``images`` in all: largest remainders; of equal ones the pool that comes first."""
    return dict(zip(found, largest_remainder(list(found.values()), images).tolist(), strict=True))

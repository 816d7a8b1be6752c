"""The components of a reward over groups of answers: values, who is right, distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from m4ov.rl.rewards.answers import Answer
from m4ov.rl.rewards.distribution import Distribution
from m4ov.rl.rewards.pool import Outcome, Pool
from m4ov.rl.rewards.registry import SECONDS, Function, RewardError, build
from m4ov.rl_recipe import RewardConfig, RewardsConfig


@dataclass(frozen=True)
class Scores:
    """Of n answers, group after group.

    Attributes:
        values: component → n values, each in its declared range.
        correct: n times whether the answer is right; one whose component failed is not.
        sizes: answers of each group.
        failures: component → n times ``None`` or why there was no value, one of :data:`~m4ov.rl.rewards.FAILURES`.
        distributions: component → what its values were like.
    """

    values: dict[str, list[float]]
    correct: list[bool]
    sizes: list[int]
    failures: dict[str, list[str | None]]
    distributions: dict[str, Distribution]

    @property
    def counts(self) -> list[tuple[int, int]]:
        """Of each group: N answers, c of them right."""
        found, place = [], 0
        for size in self.sizes:
            found.append((size, sum(self.correct[place : place + size])))
            place += size
        return found


class _Component:
    """A function, here or in processes of its own."""

    def __init__(self, name: str, config: RewardConfig, workers: int, start_seconds: float) -> None:
        self.name = name
        elsewhere = ":" in config.function  # imported only there, unless its time is not limited
        function: Function | None = None
        if not elsewhere or config.seconds == 0:
            function = build(config.function, config.options, config.low, config.high)
        default = SECONDS if function is None else function.seconds
        seconds = default if config.seconds is None else config.seconds
        self.function: Function | Pool
        if seconds:
            limits: dict[str, Any] = {"seconds": seconds, "count": workers, "start_seconds": start_seconds}
            self.function = Pool(config.function, config.options, low=config.low, high=config.high, **limits)
        else:
            assert function is not None
            self.function = function
        low, high = self.function.low, self.function.high
        failed = config.on_failure
        if failed is not None and not low <= failed <= high:
            raise RewardError(f"on_failure: expected {low:g} to {high:g}, the declared range, got {failed:g}")
        self.low, self.high, self.group = low, high, self.function.group
        self.on_failure = low if failed is None else failed

    def __call__(self, answers: Sequence[Answer]) -> tuple[list[float], list[str | None], list[str]]:
        """Values, failures, messages."""
        if isinstance(self.function, Pool):
            outcomes = self.function(answers)
        else:
            outcomes = [_here(self.function, answer) for answer in answers]
        judged = [self._judged(outcome) for outcome in outcomes]
        return [j.value for j in judged], [j.failure for j in judged], [j.message for j in judged]

    def _judged(self, outcome: Outcome) -> Outcome:
        if outcome.failure is not None:
            return outcome._replace(value=self.on_failure)
        value = outcome.value
        if math.isnan(value):
            return Outcome(self.on_failure, "NaN", "the value is NaN")
        if not self.low <= value <= self.high:
            message = f"{value:g} is not within the declared {self.low:g} to {self.high:g}"
            return Outcome(min(max(value, self.low), self.high), "out of range", message)
        return outcome


def _here(function: Function, answer: Answer) -> Outcome:
    try:
        return Outcome(float(function.call(answer)))
    except MemoryError:
        raise
    except Exception as error:
        return Outcome(0.0, "raised", f"{type(error).__name__}: {error}"[:500])


class Rewards:
    """The components of a configuration, ready to be asked. Close it, or use it as a context, to end its processes.

    No answer is ever lost: one for which a function raises, hangs, dies or gives NaN has the component's
    ``on_failure``, a value outside the declared range is put to its nearest end, and all are counted. Values do not
    depend on the number of processes (but a time limit is by the clock: a slower machine may miss one).

    Raises:
        RewardError: a component cannot be made; the message names it.
    """

    def __init__(self, config: RewardsConfig) -> None:
        if not config.components:
            raise RewardError("rewards.components: expected at least one component, got none")
        self.config = config
        self.components: dict[str, _Component] = {}
        try:
            for name, component in config.components.items():
                try:
                    found = _Component(name, component, config.workers, config.start_seconds)
                except RewardError as error:
                    raise RewardError(f"rewards.components.{name}: {error}") from error
                self.components[name] = found
            correct = self.components[config.correct]
            if correct.group:
                raise RewardError(f"rewards.correct: {config.correct} asks itself which answers are right")
            if not correct.low < config.correct_at_least <= correct.high:
                expected = f"more than {correct.low:g}, at most {correct.high:g}, the range of {config.correct}"
                raise RewardError(f"rewards.correct_at_least: expected {expected}; got {config.correct_at_least:g}")
        except RewardError:
            self.close()
            raise

    def __call__(self, groups: Sequence[Sequence[Answer]]) -> Scores:
        """The scores of the answers to each prompt."""
        answers = [answer for group in groups for answer in group]
        sizes = [len(group) for group in groups]
        values: dict[str, list[float]] = {}
        failures: dict[str, list[str | None]] = {}
        distributions: dict[str, Distribution] = {}

        def ask(name: str) -> None:
            values[name], failures[name], messages = self.components[name](answers)
            distributions[name] = Distribution.of(values[name], failures[name], messages)

        for name, component in self.components.items():
            if not component.group:
                ask(name)
        least, right = self.config.correct_at_least, self.config.correct
        correct = [
            value >= least and failure is None for value, failure in zip(values[right], failures[right], strict=True)
        ]
        answers = _told(answers, correct, sizes)
        for name, component in self.components.items():
            if component.group:
                ask(name)
        ordered = {name: values[name] for name in self.components}
        return Scores(
            ordered,
            correct,
            sizes,
            {name: failures[name] for name in ordered},
            {name: distributions[name] for name in ordered},
        )

    def close(self) -> None:
        """End the processes."""
        for component in self.components.values():
            if isinstance(component.function, Pool):
                component.function.close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _told(answers: Sequence[Answer], correct: Sequence[bool], sizes: Sequence[int]) -> list[Answer]:
    """The answers, each with whether it is right, and how many of its group are."""
    told: list[Answer] = []
    place = 0
    for size in sizes:
        rate = sum(correct[place : place + size]) / size if size else 0.0
        told += [
            replace(answers[index], correct=correct[index], solve_rate=rate, group_size=size)
            for index in range(place, place + size)
        ]
        place += size
    return told

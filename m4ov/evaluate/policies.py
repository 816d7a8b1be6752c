"""Policies against each other, from one start: tables with mean and spread over seeds, and what was claimed of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from m4ov.evaluate import plots
from m4ov.evaluate.arms import spread
from m4ov.evaluate.report import Section

#: The experiment's arms, by name; a claim is judged where those that it is about are there.
START, ACCURACY, ALL = "start", "accuracy", "all"
SKILLS = ("general", "domain")
SHORTER, RETAINED = 0.7, 0.98  # of accuracy's length at most, of the start's general skill at least


@dataclass(frozen=True)
class Figures:
    """Of held-out questions with verifiable answers, k answers to each drawn at the policy's temperature.

    Attributes:
        pass_1: share of right answers. ``pass_k``: of questions with one right among the k.
        length: tokens of an answer, mean; ``length_right``: of the right ones.
        unfinished: share of answers that did not end by themselves.
        survival: share of right answers that the same seed gives on a blank image too; NaN: none was right.
        kinds: kind of question → share of right answers.
        general, domain: exact match on the held-out questions of the start's own tasks.
    """

    pass_1: float
    pass_k: float
    length: float
    length_right: float
    unfinished: float
    survival: float
    kinds: dict[str, float]
    general: float
    domain: float


@dataclass(frozen=True)
class ArmRun:
    """One arm with one seed: updates and seconds of its training, figures of its model."""

    arm: str
    seed: int
    steps: int
    seconds: float
    figures: Figures


def by_seed(runs: Sequence[ArmRun], arm: str, figure: str) -> dict[int, float]:
    """Seed → a figure of an arm, of the seeds where it is a number."""
    values = {run.seed: float(getattr(run.figures, figure)) for run in runs if run.arm == arm}
    return {seed: value for seed, value in values.items() if not math.isnan(value)}


def retention(runs: Sequence[ArmRun], arm: str, skill: str) -> list[float]:
    """Of each seed: a skill of an arm over that of the one start; nothing where the start has none of it."""
    before = list(by_seed(runs, START, skill).values())
    if not before or not before[0]:
        return []
    return [value / before[0] for value in by_seed(runs, arm, skill).values()]


def sections(runs: Sequence[ArmRun], k: int) -> list[Section]:
    """What the report tells. ``k``: answers to a question."""
    names = list(dict.fromkeys(run.arm for run in runs))
    seeds = sorted({run.seed for run in runs if run.arm != START})
    figures = (
        ("pass@1", "pass_1", "{:.1%}"),
        (f"pass@{k}", "pass_k", "{:.1%}"),
        ("tokens", "length", "{:.1f}"),
        ("tokens of right answers", "length_right", "{:.1f}"),
        ("unfinished", "unfinished", "{:.1%}"),
        ("right on blank too", "survival", "{:.1%}"),
    )
    rows = [[name, *(_cell(by_seed(runs, name, key).values(), form) for _, key, form in figures)] for name in names]
    several = f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}. " if len(seeds) > 1 else ""
    note = (
        f"{several}pass@1: share of right answers, {k} to each held-out question; pass@{k}: of questions with one "
        f"right among the {k}. “Right on blank too”: of right answers, those that the same seed gives where the image "
        "is blank, so that the question was enough; lower is better."
    )
    shown = (figures[0], figures[1], figures[-1])
    found = [Section("Arms", ["arm", *(column for column, _, _ in figures)], rows, note=note)]
    judged = claims(runs, k)
    if judged:
        found.append(Section("What was to come out, and what came out", ["claim", "came out", "figures"], judged))
    kept = [[name, *(cell for skill in SKILLS for cell in _kept(runs, name, skill))] for name in names]
    columns = ["arm", *(column for skill in SKILLS for column in (skill, f"{skill}, of the start's"))]
    note = "Shares of right answers (exact match) on the held-out questions of what the start was trained on."
    found.append(Section("What is kept", columns, kept, note=note))
    kinds = sorted({kind for run in runs for kind in run.figures.kinds})
    rows = [[name, *(_cell(_of_kind(runs, name, kind)) for kind in kinds)] for name in names]
    found.append(Section("pass@1 by kind of question", ["arm", *kinds], rows))
    bars = {column: {name: list(by_seed(runs, name, key).values()) for name in names} for column, key, _ in shown}
    bars = {column: values for column, values in bars.items() if all(values.values())}  # of which no arm has none
    shares = {name: {column: values[name] for column, values in bars.items()} for name in names}
    found.append(Section("Final figures", figure=plots.arms(shares)))
    return found


def claims(runs: Sequence[ArmRun], k: int) -> list[list[str]]:
    """Claim, whether it came out, figures: of the means over seeds, differences taken seed by seed."""
    there = list(dict.fromkeys(run.arm for run in runs))
    if ALL not in there:
        return []
    rows = []
    others = [arm for arm in there if arm != ALL]
    if others:
        rows.append(_best(runs, others))
    if ACCURACY in there:
        rows.append(_against(runs, f"“{ALL}” has a higher pass@{k} than “{ACCURACY}”", "pass_k", higher=True))
        rows.append(_shorter(runs))
        rows.append(
            _against(runs, f"fewer right answers of “{ALL}” than of “{ACCURACY}” survive a blank image", "survival")
        )
    if START in there:
        kept = retention(runs, ALL, "general")
        mean = statistics.fmean(kept) if kept else math.nan
        claim = f"“{ALL}” keeps at least {RETAINED:.0%} of the start's general skill"
        rows.append([claim, _judged(mean >= RETAINED, bool(kept)), _cell(kept)])
    return rows


def _best(runs: Sequence[ArmRun], others: Sequence[str]) -> list[str]:
    """A mean that is lower by less than its standard error over seeds is equal."""
    figures, verdicts = [f"{_cell(by_seed(runs, ALL, 'pass_1').values())} against"], []
    for arm in others:
        differences = _differences(runs, arm, "pass_1")
        if differences:
            mean, error = _mean_and_error(differences)
            lower = "equal within the spread" if error and mean + error >= 0 else "no"
            verdicts.append("yes" if mean >= 0 else lower)
            figures.append(f"{arm} {_cell(by_seed(runs, arm, 'pass_1').values())} ({_points(mean, error)})")
    worst = [verdict for verdict in ("no", "equal within the spread", "yes") if verdict in verdicts]
    claim = f"“{ALL}” keeps the best pass@1"
    return [claim, worst[0] if worst else _judged(False, False), f"{figures[0]} {', '.join(figures[1:])}"]


def _against(runs: Sequence[ArmRun], claim: str, figure: str, *, higher: bool = False) -> list[str]:
    """A share of one arm above or below that of the other."""
    differences = _differences(runs, ACCURACY, figure)
    if not differences:
        return [claim, _judged(False, False), ""]
    mean, error = _mean_and_error(differences)
    ours, theirs = (_cell(by_seed(runs, arm, figure).values()) for arm in (ALL, ACCURACY))
    return [claim, _judged(mean > 0 if higher else mean < 0), f"{ours} against {theirs} ({_points(mean, error)})"]


def _shorter(runs: Sequence[ArmRun]) -> list[str]:
    ours, theirs = (by_seed(runs, arm, "length") for arm in (ALL, ACCURACY))
    share = statistics.fmean(ours.values()) / statistics.fmean(theirs.values())
    figures = f"{_cell(ours.values(), '{:.1f}')} against {_cell(theirs.values(), '{:.1f}')} tokens: {share:.0%}"
    return [
        f"“{ALL}” answers in at most {SHORTER:.0%} of the tokens of “{ACCURACY}”",
        _judged(share <= SHORTER),
        figures,
    ]


def _differences(runs: Sequence[ArmRun], other: str, figure: str) -> list[float]:
    """Of each seed that both have; the start is one for all seeds."""
    ours, theirs = by_seed(runs, ALL, figure), by_seed(runs, other, figure)
    if other == START and theirs:
        theirs = dict.fromkeys(ours, next(iter(theirs.values())))
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error over seeds (0: of one it is not known)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def _points(mean: float, error: float) -> str:
    return f"{100 * mean:+.1f} ± {100 * error:.1f} points" if error else f"{100 * mean:+.1f} points"


def _kept(runs: Sequence[ArmRun], arm: str, skill: str) -> list[str]:
    """A skill, and what that is of the start's."""
    return [
        _cell(by_seed(runs, arm, skill).values()),
        "" if arm == START else _cell(retention(runs, arm, skill)),
    ]


def _of_kind(runs: Sequence[ArmRun], arm: str, kind: str) -> list[float]:
    return [run.figures.kinds[kind] for run in runs if run.arm == arm and kind in run.figures.kinds]


def _cell(values: Iterable[float], form: str = "{:.1%}") -> str:
    found = list(values)
    return spread(found, form) if found else "–"


def _judged(came_out: bool, possible: bool = True) -> str:
    return ("yes" if came_out else "no") if possible else "cannot be judged"

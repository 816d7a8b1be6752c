"""Arms of an experiment against each other: a table with mean and spread over seeds, and what was claimed of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m4ov.evaluate import plots
from m4ov.evaluate.report import Section

#: The experiment's arms and skills, by name; a claim is judged where those that it is about are there.
START, DOMAIN_ONLY, MIXTURE, CURRICULUM = "start", "domain_only", "mixture", "curriculum"
ALLOTTED, UNIFORM = "allotted", "uniform"
GENERAL, DOMAIN, PRODUCED = "general", "domain", "produced"


@dataclass(frozen=True)
class ArmRun:
    """One arm with one seed.

    Attributes:
        steps, tokens, seconds: of its training.
        shares: skill → share of right answers on the records that no decision rested on.
    """

    arm: str
    seed: int
    steps: int
    tokens: int
    seconds: float
    shares: Mapping[str, float]


def spread(values: Sequence[float], form: str = "{:.1%}") -> str:
    """Mean ± sample standard deviation; of one value, the value."""
    mean = form.format(statistics.fmean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def retention(runs: Sequence[ArmRun], arm: str, skill: str = GENERAL) -> list[float]:
    """Of each seed: the skill of an arm over that of the start, which every arm began with."""
    before = {run.seed: run.shares[skill] for run in runs if run.arm == START}
    return [run.shares[skill] / before[run.seed] for run in runs if run.arm == arm and before.get(run.seed)]


def sections(
    runs: Sequence[ArmRun],
    courses: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]],
    decisions: Sequence[Mapping[str, Any]],
) -> list[Section]:
    """What the report tells.

    Args:
        courses: of one seed: arm → (step, figures) after each round.
        decisions: of one seed, the rows of the curriculum's ``decisions.jsonl``.
    """
    names = list(dict.fromkeys(run.arm for run in runs))
    seeds = sorted({run.seed for run in runs})
    skills = list(runs[0].shares)
    rows = []
    for name in names:
        of = [run for run in runs if run.arm == name]
        kept = retention(runs, name) if name != START and GENERAL in skills else []
        rows.append(
            [
                name,
                spread([run.steps for run in of], "{:,.0f}"),
                spread([run.tokens for run in of], "{:,.0f}"),
                spread([run.seconds for run in of], "{:,.0f}"),
                *(spread([run.shares[skill] for run in of]) for skill in skills),
                spread(kept) if kept else "",
            ]
        )
    many = (
        f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    )
    columns = ["arm", "steps", "tokens", "seconds", *skills, f"{GENERAL} kept"]
    note = (
        f"{many}. Shares of right answers (exact match) on held-out records that no decision rested on; "
        f"“{GENERAL} kept” is of the share that the start had, with which all others began."
    )
    found = [Section("Arms", columns, rows, note=note)]
    judged = claims(runs)
    if judged:
        found.append(Section("What was to come out, and what came out", ["claim", "came out", "figures"], judged))
    found.append(Section("Final figures", figure=plots.arms({name: _by_skill(runs, name, skills) for name in names})))
    if courses:
        note = f"Seed {seeds[0]}; measured on the gates' records, after each round."
        found.append(Section("Skills along the training", figure=plots.courses(courses), note=note))
    if decisions:
        found.append(_of_decisions(decisions, seeds[0]))
    return found


def claims(runs: Sequence[ArmRun]) -> list[list[str]]:
    """Claim, whether it came out, figures: of the means over seeds."""
    there = {run.arm for run in runs}
    rows: list[list[str]] = []
    if not {GENERAL, DOMAIN} <= runs[0].shares.keys():
        return rows
    if {DOMAIN_ONLY, CURRICULUM} <= there:
        ours, theirs = _mean(runs, CURRICULUM, DOMAIN), _mean(runs, DOMAIN_ONLY, DOMAIN)
        rows.append(
            [
                "the curriculum is within 1 point of domain-only training in the domain, or better",
                _yes(ours >= theirs - 0.01),
                f"{ours:.1%} against {theirs:.1%}",
            ]
        )
    kept = retention(runs, CURRICULUM)
    if kept:
        mean = statistics.fmean(kept)
        rows.append(
            ["the curriculum keeps at least 98% of the general skill", _yes(mean >= 0.98), f"{mean:.1%} {_each(kept)}"]
        )
    kept = retention(runs, DOMAIN_ONLY)
    if kept:
        mean = statistics.fmean(kept)
        rows.append(
            ["domain-only training does not: it keeps less than 98%", _yes(mean < 0.98), f"{mean:.1%} {_each(kept)}"]
        )
    if {MIXTURE, CURRICULUM} <= there:
        figures = [
            f"{skill} {_mean(runs, CURRICULUM, skill):.1%} against {_mean(runs, MIXTURE, skill):.1%}"
            for skill in (GENERAL, DOMAIN)
        ]
        better = all(_mean(runs, CURRICULUM, skill) >= _mean(runs, MIXTURE, skill) for skill in (GENERAL, DOMAIN))
        claim = "the curriculum is at least as good as the plain mixture in both"
        rows.append([claim, _yes(better), "; ".join(figures)])
    if {ALLOTTED, UNIFORM} <= there:
        rows.append(_allotment(runs))
    return rows


def _allotment(runs: Sequence[ArmRun]) -> list[str]:
    """Allotted by density against evenly: judged by the held-out produced questions, which are of all that is produced;
    without them, by all skills together. A mean that is lower by less than its standard error over seeds is equal."""
    judged = [PRODUCED] if PRODUCED in runs[0].shares else list(runs[0].shares)

    def of(arm: str) -> dict[int, float]:
        return {run.seed: statistics.fmean(run.shares[skill] for skill in judged) for run in runs if run.arm == arm}

    ours, theirs = of(ALLOTTED), of(UNIFORM)
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    came_out = _yes(mean >= 0) if mean >= 0 or mean + error < 0 or not error else "equal within the spread"
    figures = [
        f"{skill} {_mean(runs, ALLOTTED, skill):.1%} against {_mean(runs, UNIFORM, skill):.1%}"
        for skill in runs[0].shares
    ]
    figures.append(f"difference {100 * mean:+.1f} ± {100 * error:.1f} points" if error else f"{100 * mean:+.1f} points")
    what = "questions allotted by information density do at least as well as the same number allotted evenly"
    return [f"{what} (judged by {', '.join(judged)})", came_out, "; ".join(figures)]


def _of_decisions(decisions: Sequence[Mapping[str, Any]], seed: int) -> Section:
    rows = []
    for row in decisions:
        conditions = [
            f"{skill} {found['is']:.1%} {'≥' if found['holds'] else '<'} {found['must be']:.1%}"
            for found_of in (row["targets"], row["guards"])
            for skill, found in found_of.items()
        ]
        rows.append(
            [
                f"{row['stage']} {row['name']}",
                str(row["round"]),
                str(row["arm_step"]),
                "; ".join(f"{skill} {share:.1%}" for skill, share in row["figures"].items()),
                "; ".join(conditions),
                row["action"],
                "; ".join(f"{pool} {count}" for pool, count in row["next_images"].items()),
            ]
        )
    columns = ["stage", "round", "step", "measured", "targets and guards", "decision", "images of a step from here"]
    return Section("Decisions of the curriculum", columns, rows, note=f"Seed {seed}.", printed=False)


def _by_skill(runs: Sequence[ArmRun], arm: str, skills: Sequence[str]) -> dict[str, list[float]]:
    return {skill: [run.shares[skill] for run in runs if run.arm == arm] for skill in skills}


def _mean(runs: Sequence[ArmRun], arm: str, skill: str) -> float:
    return statistics.fmean(run.shares[skill] for run in runs if run.arm == arm)


def _each(values: Sequence[float]) -> str:
    return f"(seeds: {', '.join(f'{value:.1%}' for value in values)})" if len(values) > 1 else ""


def _yes(came_out: bool) -> str:
    return "yes" if came_out else "no"

"""Tables of what came of benchmarks: a rule's score on each, gain and leakage, and answers that could not be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from m4ov.evaluate.accuracy import Accuracy
from m4ov.evaluate.intervals import Share, micro
from m4ov.evaluate.report import Section, accuracy_note
from m4ov.evaluate.scoring import Outcome

_EXAMPLE = 160  # characters of an answer that is shown


def sections(outcomes: Sequence[Outcome], accuracies: Sequence[Accuracy], judge: str) -> list[Section]:
    """Of a report.

    Args:
        accuracies: of the quickstart's held-out splits.
        judge: who it was and what it cost; empty: there was none.
    """
    found = []
    if outcomes:
        found.append(_scores(outcomes, judge))
    if accuracies:
        found.append(_held_out(accuracies))
    if gains := [(outcome, rule) for outcome in outcomes for rule in outcome.gains]:
        found.append(_gains(gains))
    for outcome in outcomes:
        found += [_failures(outcome), _categories(outcome)]
    if outcomes:
        rows = [
            [outcome.benchmark.name, rule.name, rule.note] for outcome in outcomes for rule in outcome.benchmark.rules
        ]
        found.append(Section("The rules", ["benchmark", "rule", "how an answer is read"], rows, printed=False))
    return found


def shares_of(accuracy: Accuracy) -> Share:
    """The share of right answers to a split."""
    return micro(accuracy.right)


def _scores(outcomes: Sequence[Outcome], judge: str) -> Section:
    rules = list(dict.fromkeys(rule.name for outcome in outcomes for rule in outcome.benchmark.rules))
    columns = [(outcome, metric) for outcome in outcomes for metric in _metrics(outcome)]
    rows = [[rule, *(_cell(outcome.shares.get((rule, metric))) for outcome, metric in columns)] for rule in rules]
    heads = [" ".join(filter(None, (outcome.benchmark.name, metric))) for outcome, metric in columns]
    asked = "; ".join(
        f"{outcome.benchmark.name}: {outcome.questions:,} questions, the rules disagree on {outcome.disagreements:,}, "
        f"{outcome.cut:,} answers cut off, {outcome.refused:,} not asked"
        + (f"; {outcome.note}" if outcome.note else "")
        for outcome in outcomes
    )
    note = (
        f"{asked}. Every rule reads the same answers, to the benchmark's own prompts. In brackets Wilson's 95% "
        "interval. An answer that a rule cannot read is wrong; nothing is drawn at random. "
    )
    note += (
        f"Judge: {judge}; its wording is ours, so these figures are not those of a tool with another judge."
        if judge
        else "There was no judge: where a tool's rule asks an LLM, its figure here is that of the part without one, "
        "and the rest are extraction failures (below); --judge gives them to one."
    )
    return Section("Scores by rule", ["rule", *heads], rows, note=note)


def _metrics(outcome: Outcome) -> list[str]:
    return list(dict.fromkeys(metric for _, metric in outcome.shares))


def _cell(share: Share | None) -> str:
    return "–" if share is None else str(share)


def _held_out(accuracies: Sequence[Accuracy]) -> Section:
    rows = []
    for found in accuracies:
        rows.append([found.split, f"{sum(found.right):,} of {len(found.right):,}", str(shares_of(found))])
        for kind, (right, asked) in found.kinds.items():
            rows.append([f"  {kind}", f"{right:,} of {asked:,}", str(Share(right / asked, asked))])
    columns = ["held-out questions", "right", "share"]
    return Section("The quickstart's held-out questions", columns, rows, note=accuracy_note())


def _gains(gains: Sequence[tuple[Outcome, str]]) -> Section:
    rows = []
    for outcome, rule in gains:
        found: Mapping[str, float] = outcome.gains[rule]
        figures = [f"{100 * found[name]:.1f}" if name in found else "–" for name in ("S_v", "S_wv", "MG", "S_t", "ML")]
        rows.append([outcome.benchmark.name, rule, *figures])
    columns = ["benchmark", "rule", "S_v", "S_wv", "MG", "S_t", "ML"]
    note = (
        "In points. Gain MG = S_v − S_wv, leakage ML = max(0, S_wv − S_t): scores with the images, without them, and "
        "of the language model beneath (--text-base)."
    )
    return Section("Multi-modal gain and leakage", columns, rows, note=note)


def _failures(outcome: Outcome) -> Section:
    names = [rule.name for rule in outcome.benchmark.rules]
    total = ["all", *(str(sum(found[name] for found in outcome.failures.values())) for name in names)]
    rows = [[kind, *(str(found[name]) for name in names)] for kind, found in outcome.failures.items()]
    shown = [
        f"{kind}: {', '.join(repr(_shortened(answer)) for answer in answers)}"
        for kind, answers in outcome.unread.items()
    ]
    note = ("For example " + "; ".join(shown) + ".") if shown else "Every rule read every answer."
    return Section(
        f"{outcome.benchmark.name}: answers of which nothing was extracted",
        ["answers", *names],
        [total, *rows],
        note=note,
    )


def _shortened(answer: str) -> str:
    text = " ".join(answer.split())
    return text if len(text) <= _EXAMPLE else text[:_EXAMPLE] + "…"


def _categories(outcome: Outcome) -> Section:
    names = [rule.name for rule in outcome.benchmark.rules]
    categories = list(outcome.categories[names[0]])
    rows = [
        [category, f"{outcome.categories[names[0]][category].count:,.0f}"]
        + [str(outcome.categories[name][category]) for name in names]
        for category in categories
    ]
    note = "All rows alike, each rotation of an option circle by itself." if "circular" in _metrics(outcome) else ""
    return Section(
        f"{outcome.benchmark.name}: by category", ["category", "asked", *names], rows, note=note, printed=False
    )

"""Answers read by every rule, and what comes of them: shares with intervals, gain and leakage, failures by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m4ov.data.teacher import Teacher
from m4ov.evaluate.asking import Asking, Said
from m4ov.evaluate.benchmarks import mmstar
from m4ov.evaluate.benchmarks.base import Benchmark, Reading, Rule
from m4ov.evaluate.benchmarks.failures import kind_of
from m4ov.evaluate.intervals import Share, micro
from m4ov.evaluate.judge import Judged, judge


@dataclass(frozen=True)
class Scored:
    """An answer as the rules read it.

    Attributes:
        readings: by rule.
        judged: what a judge extracted, where a rule asked it; ``None``: none was asked.
        by_judge: the rules whose reading is of the judge's text.
    """

    asking: Asking
    said: Said
    readings: Mapping[str, Reading]
    judged: Judged | None = None
    by_judge: frozenset[str] = frozenset()

    @property
    def kind(self) -> str:
        """What sort of answer it is (:data:`m4ov.evaluate.benchmarks.failures.KINDS`)."""
        return kind_of(self.asking.question, self.said.answer, self.said.finish)

    def to_json(self, benchmark: str) -> dict[str, Any]:
        """The record of this question."""
        question, failed = self.asking.question, any(one.value is None for one in self.readings.values())
        return {
            "benchmark": benchmark,
            "id": question.id,
            "group": question.group,
            "category": question.category,
            "with_image": not self.asking.blind,
            "prompt": question.text,
            "truth": question.answer,
            "answer": self.said.answer,
            "finish": self.said.finish,
            "tokens": self.said.tokens,
            **({"problem": self.said.problem} if self.said.problem else {}),
            **({"judged": self.judged.value, "judge_problem": self.judged.problem} if self.judged else {}),
            "rules": {
                name: {"extracted": one.value, "right": one.right, "by": self._by(name, one)}
                for name, one in self.readings.items()
            },
            **({"kind": self.kind} if failed else {}),
        }

    def _by(self, rule: str, reading: Reading) -> str:
        return "nothing" if reading.value is None else "judge" if rule in self.by_judge else "rule"


def score(benchmark: Benchmark, answers: Mapping[Asking, Said], teacher: Teacher | None = None) -> list[Scored]:
    """Every answer by every rule of a benchmark.

    Args:
        teacher: the judge, asked once for each answer of which a rule that has a judge extracted nothing.
    """
    first = [
        Scored(asking, said, {rule.name: rule.read(asking.question, said.answer) for rule in benchmark.rules})
        for asking, said in answers.items()
    ]
    if teacher is None:
        return first
    ask = [place for place, one in enumerate(first) if one.said.answer.strip() and _waiting(benchmark, one)]
    judged = judge(teacher, [(first[place].asking.question, first[place].said.answer) for place in ask])
    for place, found in zip(ask, judged, strict=True):
        first[place] = _with_judge(benchmark, first[place], found)
    return first


def _waiting(benchmark: Benchmark, scored: Scored) -> list[Rule]:
    """The rules that ask a judge about an answer."""
    return [rule for rule in benchmark.rules if rule.judged and scored.readings[rule.name].value is None]


def _with_judge(benchmark: Benchmark, scored: Scored, judged: Judged) -> Scored:
    readings, by_judge = dict(scored.readings), set()
    if judged.value is not None:
        for rule in _waiting(benchmark, scored):
            assert rule.judged is not None
            readings[rule.name] = rule.judged(scored.asking.question, judged.value)
            by_judge.add(rule.name)
    return Scored(scored.asking, scored.said, readings, judged, frozenset(by_judge))


@dataclass(frozen=True)
class Outcome:
    """What came of a benchmark.

    Attributes:
        shares: (rule, metric) → share of right answers, of the questions with their images.
        categories: rule → category → share, of all answers alike.
        failures: kind → rule → how many answers nothing was extracted of.
        unread: kind → a few such answers.
        gains: rule → S_v, S_wv, MG, S_t, ML (the last two only where the language model beneath is known).
        disagreements: questions that some rules call right and others wrong.
        note: what is not as published.
        cut: answers that ended at the most tokens; ``refused``: questions that could not be asked.
    """

    benchmark: Benchmark
    questions: int
    shares: Mapping[tuple[str, str], Share]
    categories: Mapping[str, Mapping[str, Share]]
    failures: Mapping[str, Mapping[str, int]]
    unread: Mapping[str, Sequence[str]]
    gains: Mapping[str, Mapping[str, float]]
    disagreements: int
    note: str
    cut: int
    refused: int

    def to_json(self) -> dict[str, Any]:
        def written(share: Share) -> dict[str, Any]:
            return {"share": share.value, "interval": list(share.interval()), "count": share.count}

        rules: dict[str, dict[str, Any]] = {rule.name: {} for rule in self.benchmark.rules}
        for (rule, metric), share in self.shares.items():
            rules[rule][metric or "share"] = written(share)
        return {
            "questions": self.questions,
            "rules": rules,
            "categories": {
                rule: {category: written(share) for category, share in found.items()}
                for rule, found in self.categories.items()
            },
            "extraction_failures": {kind: dict(found) for kind, found in self.failures.items()},
            "gain_and_leakage": {rule: dict(found) for rule, found in self.gains.items()},
            "disagreements": self.disagreements,
            **({"note": self.note} if self.note else {}),
            "cut_off": self.cut,
            "not_asked": self.refused,
        }


def outcome(benchmark: Benchmark, scored: Sequence[Scored], base: Sequence[Scored] = ()) -> Outcome:
    """What came of the answers.

    Args:
        base: answers of the language model beneath, without images, to the same questions.

    Raises:
        ValueError: there is no answer, or ``base`` is of other questions.
    """
    seen = [one for one in scored if not one.asking.blind]
    if not seen:
        raise ValueError(f"{benchmark.name}: expected at least one answer, got none")
    blind, base = [one for one in scored if one.asking.blind], [one for one in base if one.asking.blind]
    names = [rule.name for rule in benchmark.rules]
    failed = [one for one in seen if any(reading.value is None for reading in one.readings.values())]
    kinds = Counter(one.kind for one in failed)
    verdicts = [{reading.right for reading in one.readings.values()} for one in seen]
    return Outcome(
        benchmark,
        len(seen),
        _shares(benchmark, seen),
        {name: _by_category(seen, name) for name in names},
        {
            kind: {name: sum(one.readings[name].value is None for one in failed if one.kind == kind) for name in names}
            for kind, _ in kinds.most_common()
        },
        {kind: [one.said.answer for one in failed if one.kind == kind][:3] for kind in kinds},
        _gains(benchmark, seen, blind, base) if blind else {},
        sum(len(found) > 1 for found in verdicts),
        benchmark.note([one.asking.question for one in seen]),
        sum(one.said.finish in ("length", "window") for one in seen),
        sum(one.said.finish == "refused" for one in seen),
    )


def _shares(benchmark: Benchmark, scored: Sequence[Scored]) -> dict[tuple[str, str], Share]:
    questions = [one.asking.question for one in scored]
    return {
        (rule.name, name): metric(questions, [one.readings[rule.name].right for one in scored])
        for rule in benchmark.rules
        for name, metric in rule.metrics.items()
    }


def _by_category(scored: Sequence[Scored], rule: str) -> dict[str, Share]:
    found: dict[str, list[bool]] = {}
    for one in scored:
        if one.asking.question.category:
            found.setdefault(one.asking.question.category, []).append(one.readings[rule].right)
    return {category: micro(right) for category, right in sorted(found.items())}


def _gains(
    benchmark: Benchmark, seen: Sequence[Scored], blind: Sequence[Scored], base: Sequence[Scored]
) -> dict[str, dict[str, float]]:
    asked = {one.asking.question.id for one in seen}
    for what, others in (("without images", blind), ("of the language model beneath", base)):
        there = {one.asking.question.id for one in others}
        if others and there != asked:
            raise ValueError(
                f"{benchmark.name}: expected answers {what} to the same {len(asked)} questions, got {len(there)}, of "
                f"which {len(there & asked)} are the same"
            )
    with_images, without, beneath = (_shares(benchmark, part) if part else {} for part in (seen, blind, base))
    found: dict[str, dict[str, float]] = {}
    for (rule, metric), share in with_images.items():
        first = without[rule, metric].value
        found[rule] = {"S_v": share.value, "S_wv": first, "MG": mmstar.gain(share.value, first)}
        if beneath:
            last = beneath[rule, metric].value
            found[rule] |= {"S_t": last, "ML": mmstar.leakage(first, last)}
    return found

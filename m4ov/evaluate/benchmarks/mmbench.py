"""MMBench: multiple choice in circles (arXiv 2307.06281).

A question is asked in every rotation of its options and counts as right (``circular``) if every one is; ``vanilla`` is
the share of right answers to the questions as they stand, once each. The TSVs hold the rotations as rows of their own,
whose index is the question's plus a multiple of a million and whose image is the question's index.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from m4ov.data.records import RecordError, Where, short
from m4ov.evaluate.benchmarks import choices, tables
from m4ov.evaluate.benchmarks.base import NOTHING, Benchmark, Question, Reading, Rule
from m4ov.evaluate.intervals import Share, micro

LETTERS = "ABCDEFGH"
_ROTATION = 1_000_000  # between the indices of a question's rotations

Choose = Callable[[str, Mapping[str, str]], str | None]


def read(paths: Sequence[Path]) -> list[Question]:
    """The questions of TSVs (``index``, ``question``, ``hint``, ``A`` …, ``answer``, ``category``, ``l2-category``,
    ``image``). Where no row is a rotation, the rotations are made.

    Raises:
        RecordError: a row is none, or its answer is not published.
    """
    rows = list(tables.rows(paths))
    seen: set[str] = set()
    indices = [tables.once(str(_index(row, where)), seen, where, "index") for where, row in rows]
    fields = zip(indices, rows, strict=True)
    images = tables.references({index: (where, row.get("image")) for index, (where, row) in fields})
    found = [_question(index, row, where, images[index]) for index, (where, row) in zip(indices, rows, strict=True)]
    if any(int(index) >= _ROTATION for index in indices):
        return found
    return [turned for question in found for turned in rotations(question)]


def _index(row: dict[str, Any], where: Where) -> int:
    return int(tables.number(row.get("index"), float, where, "index"))


def _question(index: str, row: dict[str, Any], where: Where, image: str) -> Question:
    options = options_of(row, where)
    answer = tables.truth_of(row, where)
    if answer not in options:
        raise RecordError(where, "answer", "field", f"expected one of {', '.join(options)}, got {short(answer)}")
    group = tables.number(row["g_index"], float, where, "g_index") if "g_index" in row else int(index) % _ROTATION
    text = prompt(tables.text_of(row, "question", where), options, str(row.get("hint", "")))
    category = str(row.get("l2-category", row.get("category", "")))
    return Question(index, text, (image,), answer, "option", options=options, group=str(int(group)), category=category)


def options_of(row: dict[str, Any], where: Where) -> dict[str, str]:
    """Letter → text of the columns ``A``, ``B``, ….

    Raises:
        RecordError: there is none, or one is missing between others.
    """
    there = [letter for letter in LETTERS if letter in row]
    if not there or "".join(there) != LETTERS[: len(there)]:
        got = ", ".join(there) or "none"
        raise RecordError(where, "A", "options", f"expected options A, B, … without a gap, got {got}")
    return {letter: str(row[letter]) for letter in there}


def prompt(question: str, options: Mapping[str, str], hint: str = "") -> str:
    """The published prompt, which VLMEvalKit and MMStar have too."""
    before = f"Hint: {hint}\n" if hint else ""
    return f"{before}Question: {question}\n{_listed(options)}"


def _listed(options: Mapping[str, str]) -> str:
    lines = "".join(f"{letter}. {text}\n" for letter, text in options.items())
    return f"Options:\n{lines}Please select the correct answer from the options above. \n"


def rotations(question: Question) -> list[Question]:
    """A question of n options as it stands, and its n − 1 other rotations: in the k-th, option k + i is at place i."""
    letters, texts = list(question.options), list(question.options.values())
    stem, truth = question.text.removesuffix(_listed(question.options)), letters.index(question.answer)
    found = [question]
    for turn in range(1, len(texts)):
        options = dict(zip(letters, texts[turn:] + texts[:turn], strict=True))
        found.append(
            replace(
                question,
                id=str(int(question.id) + turn * _ROTATION),
                text=stem + _listed(options),
                answer=letters[(truth - turn) % len(texts)],
                options=options,
            )
        )
    return found


def circular(questions: Sequence[Question], right: Sequence[bool]) -> Share:
    """CircularEval: the share of groups of which every rotation is right."""
    whole: dict[str, bool] = {}
    for question, ok in zip(questions, right, strict=True):
        whole[question.group] = whole.get(question.group, True) and ok
    return micro(list(whole.values()))


def incomplete(questions: Sequence[Question]) -> str:
    """Circles that are not whole, which are easier than they should be; and those without the question as it stands."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.group, []).append(question)
    open_circles = sum(len(found) < len(found[0].options) for found in groups.values())
    headless = sum(all(question.id != group for question in found) for group, found in groups.items())
    parts = [f"{open_circles} of {len(groups)} questions lack rotations"] if open_circles else []
    return "; ".join([*parts, *([f"{headless} have rotations alone"] if headless else [])])


def vanilla(questions: Sequence[Question], right: Sequence[bool]) -> Share:
    """The share of right answers to the questions as they stand."""
    return micro([ok for question, ok in zip(questions, right, strict=True) if question.id == question.group])


def read_option(choose: Choose, question: Question, answer: str) -> Reading:
    """What one of :mod:`m4ov.evaluate.benchmarks.choices` makes of an answer, where the truth is a letter."""
    letter = choose(answer, question.options)
    return NOTHING if letter is None else Reading(letter, letter == question.answer)


def option_rule(name: str, choose: Choose, *, judged: bool, note: str, **more: Any) -> Rule:
    """A rule of :func:`read_option`; a judge's answer is read by the same."""
    read = partial(read_option, choose)
    return Rule(name, read, read if judged else None, note=note, **more)


_METRICS = {"circular": circular, "vanilla": vanilla}
MMBENCH = Benchmark(
    "mmbench",
    ("mmbench",),
    "dev",
    (".tsv",),
    read,
    (
        option_rule(
            "official",
            choices.official,
            judged=True,
            metrics=_METRICS,
            note="the only option letter that stands as a word, else the only option text; an LLM for the rest",
        ),
        option_rule(
            "VLMEvalKit",
            choices.vlmevalkit,
            judged=True,
            metrics=_METRICS,
            note='the letter within the last four words, then "answer is X", then the only option text; an LLM for '
            "the rest (and, there, a random letter where that fails three times)",
        ),
        option_rule(
            "lmms-eval",
            choices.lmms_eval,
            judged=True,
            metrics=_METRICS,
            note="letters A to E with punctuation around them, none alone where an A is among more than three words; "
            'an LLM for the rest (and, there, a random letter); a missing option is the text "nan"',
        ),
    ),
    note=incomplete,
)

"""MathVista: options, integers, decimals and lists about pictures (arXiv 2310.02255).

The official rule has two halves. An answer is *extracted*: it is itself an option's text, an integer or a decimal, or
else an LLM says what it is. What was extracted is *normalised*: a letter becomes its option, any other text the nearest
option by edit distance; ``int(float(x))``; a decimal rounded to the question's precision; and compared as a string.
Without a judge what needs the LLM is an extraction failure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m4ov.data.records import RecordError, Where, short
from m4ov.evaluate.benchmarks import choices, tables
from m4ov.evaluate.benchmarks.base import NOTHING, Benchmark, Question, Reading, Rule
from m4ov.evaluate.benchmarks.mmbench import LETTERS

_NUMBERS = ("integer", "float", "list")
_LETTER = re.compile(r"\(([a-zA-Z])\)")


def read(paths: Sequence[Path]) -> list[Question]:
    """The questions of Parquet files (``pid``, ``query``, ``decoded_image``, ``choices``, ``precision``, ``answer``,
    ``question_type``, ``answer_type``, ``metadata``); asked is ``query``, which ends with the official hint.

    Raises:
        RecordError: a row is none, or its answer is not published (the split ``test``).
    """
    seen: set[str] = set()
    return [_question(row, where, seen) for where, row in tables.rows(paths)]


def _question(row: dict[str, Any], where: Where, seen: set[str]) -> Question:
    index = tables.once(tables.text_of(row, "pid", where), seen, where, "pid")
    answer, metadata = tables.truth_of(row, where), row.get("metadata")
    category = str(metadata.get("task", "")) if isinstance(metadata, dict) else ""
    kind, options = tables.text_of(row, "answer_type", where), {}
    if row.get("question_type") == "multi_choice":
        texts = row.get("choices")
        if not isinstance(texts, list) or not 1 <= len(texts) <= len(LETTERS) or answer not in map(str, texts):
            expected = f"expected up to {len(LETTERS)} with the answer {short(answer)}"
            raise RecordError(where, "choices", "options", f"{expected}, got {short(texts)}")
        kind, options = "option", dict(zip(LETTERS, map(str, texts), strict=False))
    elif kind not in _NUMBERS:
        raise RecordError(where, "answer_type", "field", f"expected one of {', '.join(_NUMBERS)}, got {short(kind)}")
    precision = None
    if kind == "float":  # a decimal in the file: round(x, 2.0) raises, which some copies of the rule swallow
        precision = int(tables.number(row.get("precision"), float, where, "precision"))
    image = tables.shown(row.get("decoded_image"), where, "decoded_image")
    text = tables.text_of(row, "query", where)
    return Question(
        index, text, (image,), answer, kind, options=options, group=index, category=category, precision=precision
    )


def distance(one: str, other: str) -> int:
    """Levenshtein's edit distance: insertions, deletions and replacements of a character."""
    above = list(range(len(other) + 1))
    for row, a in enumerate(one, 1):
        line = [row]
        for column, b in enumerate(other, 1):
            line.append(min(above[column] + 1, line[column - 1] + 1, above[column - 1] + (a != b)))
        above = line
    return above[-1]


def extract(question: Question, answer: str) -> str | None:
    """The first half without its LLM."""
    if question.kind == "option":
        return answer if answer in question.options.values() else None
    try:
        if question.kind == "integer":
            return str(int(answer))
        if question.kind == "float":
            return str(float(answer))
    except ValueError:
        pass
    return None


def normalise(question: Question, extracted: str) -> str | None:
    """The second half. ``None``: nothing was extracted, or no number where one is asked for. (Officially an empty text
    becomes the nearest option, which is the shortest: a guess, and not made here.)"""
    if not extracted.strip():
        return None
    if question.kind == "option":
        extracted = extracted.strip()
        if letters := _LETTER.findall(extracted):
            extracted = letters[0].upper()
        if extracted in question.options:
            return question.options[extracted]
        return min(question.options.values(), key=lambda text: distance(extracted, text))
    try:
        if question.kind == "integer":
            return str(int(float(extracted)))
        if question.kind == "float":
            return str(round(float(extracted), question.precision))
    except (ValueError, OverflowError):
        return None
    return extracted


def official(question: Question, answer: str) -> Reading:
    """Extracted and normalised."""
    extracted = extract(question, answer)
    return NOTHING if extracted is None else official_judged(question, extracted)


def official_judged(question: Question, extracted: str) -> Reading:
    """Normalised alone, of what a judge extracted."""
    value = normalise(question, extracted)
    return NOTHING if value is None else Reading(value, value == question.answer)


def lmms_eval(question: Question, answer: str) -> Reading:
    """As :func:`official`, spaces around the answer and around what is compared left out."""
    extracted = extract(question, answer.strip())
    return NOTHING if extracted is None else lmms_eval_judged(question, extracted)


def lmms_eval_judged(question: Question, extracted: str) -> Reading:
    """As :func:`official_judged`, spaces left out."""
    value = normalise(question, extracted)
    return NOTHING if value is None else Reading(value, value.strip() == question.answer.strip())


def vlmevalkit(question: Question, answer: str) -> Reading:
    """VLMEvalKit's: an option as in MMBench, compared by its letter; ``int(answer)`` and ``float(answer)``, compared as
    numbers, so that a decimal is never rounded to its precision. Its answer to a list is the text "None", so that none
    is ever right."""
    if question.kind == "option":
        letter = choices.vlmevalkit(answer, question.options)
        return NOTHING if letter is None else Reading(letter, question.options[letter] == question.answer)
    kind = {"integer": int, "float": float}.get(question.kind)
    if kind is None:
        return NOTHING
    try:
        value = kind(answer)
    except ValueError:
        return NOTHING
    try:
        return Reading(str(value), value == kind(question.answer))
    except ValueError:  # the truth is no such number
        return Reading(str(value), False)


MATHVISTA = Benchmark(
    "mathvista",
    ("mathvista",),
    "testmini",
    (".parquet",),
    read,
    (
        Rule(
            "official",
            official,
            official_judged,
            note="the whole answer as an option's text or a number, an LLM for all else; nearest option by edit "
            "distance, int(float(x)), rounded to the precision, equal strings",
        ),
        Rule(
            "VLMEvalKit",
            vlmevalkit,
            vlmevalkit,
            note="options as in MMBench; int(x) and float(x) of the whole answer, never rounded; an LLM for all else; "
            "an answer to a list is compared as the text None and never right",
        ),
        Rule("lmms-eval", lmms_eval, lmms_eval_judged, note="as the official one, spaces around the answer left out"),
    ),
)

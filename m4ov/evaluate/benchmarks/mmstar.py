"""MMStar: 1,500 questions that need their image (arXiv 2403.20330), and two figures that tell whether they did.

Multi-modal gain MG = S_v − S_wv and multi-modal leakage ML = max(0, S_wv − S_t): S_v is the score, S_wv that without
the images, S_t that of the language model on which the model was built, which sees no images either.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m4ov.data.records import RecordError, Where, short
from m4ov.evaluate.benchmarks import choices, tables
from m4ov.evaluate.benchmarks.base import Benchmark, Question
from m4ov.evaluate.benchmarks.mmbench import LETTERS, option_rule, options_of, prompt
from m4ov.evaluate.intervals import Share, macro

_OPTION = re.compile(r"(?:^|[,\n]\s*|\s)([A-H]): ")


def read(paths: Sequence[Path]) -> list[Question]:
    """The questions of the TSV (``index``, ``question``, ``A`` … or options inside of the question, ``answer``,
    ``category``, ``l2_category``, ``image`` in base64 or an index) or the Parquet file (``image`` as bytes).

    Raises:
        RecordError: a row is none.
    """
    rows = list(tables.rows(paths))
    seen: set[str] = set()
    indices = [tables.once(tables.text_of(row, "index", where), seen, where, "index") for where, row in rows]
    fields = zip(indices, rows, strict=True)
    images = tables.references({index: (where, row.get("image")) for index, (where, row) in fields})
    return [_question(index, row, where, images[index]) for index, (where, row) in zip(indices, rows, strict=True)]


def _question(index: str, row: dict[str, Any], where: Where, image: str) -> Question:
    text = tables.text_of(row, "question", where)
    if "A" in row:
        options = options_of(row, where)
        asked = prompt(text, options, str(row.get("hint", "")))
    else:
        options = options_in(text)
        asked = text
    answer = tables.truth_of(row, where).strip().upper()
    if answer not in options:
        expected = f"expected one of the options in the question ({', '.join(options) or 'none was found'})"
        raise RecordError(where, "answer", "field", f"{expected}, got {short(answer)}")
    category = tables.text_of(row, "l2_category", where, "l2-category")
    return Question(index, asked, (image,), answer, "option", options=options, group=index, category=category)


def options_in(question: str) -> dict[str, str]:
    """Letter → text of a question as the Parquet file has it: ``…\\nOptions: A: one, B: two, C: three``."""
    _, _, listed = question.rpartition("Options:")
    places: list[re.Match[str]] = []
    for match in _OPTION.finditer(listed):
        if match[1] == LETTERS[len(places)]:  # another letter is part of a text
            places.append(match)
            if len(places) == len(LETTERS):
                break
    ends = [match.start() for match in places[1:]] + [len(listed)]
    return {match[1]: listed[match.end() : end].strip() for match, end in zip(places, ends, strict=False)}


def by_category(questions: Sequence[Question], right: Sequence[bool]) -> Share:
    """lmms-eval's score: the mean over the (18) categories, each counted alike."""
    found: dict[str, list[bool]] = {}
    for question, ok in zip(questions, right, strict=True):
        found.setdefault(question.category, []).append(ok)
    return macro(found)


def gain(seen: float, blind: float) -> float:
    """MG of scores with and without the images."""
    return seen - blind


def leakage(blind: float, base: float) -> float:
    """ML of the score without the images and that of the language model beneath."""
    return max(0.0, blind - base)


MMSTAR = Benchmark(
    "mmstar",
    ("mmstar",),
    "val",
    (".tsv", ".parquet"),
    read,
    (
        option_rule(
            "official",
            choices.leading,
            judged=False,
            note='one character: the first, or the one behind "(", "option " or "the answer is "; all questions alike',
        ),
        option_rule(
            "VLMEvalKit",
            choices.vlmevalkit,
            judged=True,
            note='as in MMBench: the letter within the last four words, then "answer is X", then the only option '
            "text; all questions alike",
        ),
        option_rule(
            "lmms-eval",
            choices.leading,
            judged=False,
            metrics={"": by_category},
            note="the official character; the mean over the 18 categories, each counted alike",
        ),
    ),
    blind=True,
)

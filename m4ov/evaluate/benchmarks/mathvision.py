"""MATH-Vision: competition problems, options or numbers and formulas (arXiv 2402.14804).

The official rule needs no judge: it cuts an answer down to what follows "answer is" or stands in ``\\boxed{}``, strips
LaTeX and units, and compares with the letter and with the option's text, as strings or as numbers of two decimals.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from m4ov.data.records import RecordError, Where, short
from m4ov.evaluate.benchmarks import arithmetic, choices, tables
from m4ov.evaluate.benchmarks.base import NOTHING, Benchmark, Question, Reading, Rule
from m4ov.evaluate.benchmarks.mmbench import LETTERS

_FLAGS = ("the final answer is", "the answer is", "the correct answer is", "the answer should be")
_BOXED = re.compile(r"\\boxed\{([^}]*)\}")  # VLMEvalKit's: up to the first brace that closes
_LAST_BOX = re.compile(r"oxed\{(.*)\}", re.DOTALL)
# In this order; the answer is in lower case and has no spaces by then.
_DROPPED = (
    *("\\,", "\n", "\\text", "\\mbox", "\\left", "\\right", "^{\\circ}", "^\\circ", "{m}^3", "m^3", "{units}"),
    *("units", "{km}", "km", "\\!", "\\$", "$", "\\%"),
)
_SEPARATORS = {"(": ")", "[": "]"}


def read(paths: Sequence[Path]) -> list[Question]:
    """The questions of Parquet files (``decoded_image``) or of JSONL beside its folder of images (``image``):
    ``id``, ``question``, ``options``, ``answer``, ``subject``, ``level``.

    Raises:
        RecordError: a row is none.
    """
    seen: set[str] = set()
    return [_question(row, where, seen) for where, row in tables.rows(paths)]


def _question(row: dict[str, Any], where: Where, seen: set[str]) -> Question:
    index = tables.once(tables.text_of(row, "id", where), seen, where, "id")
    asked, answer = tables.text_of(row, "question", where), tables.truth_of(row, where)
    texts = row.get("options") or []
    if not isinstance(texts, list) or len(texts) > len(LETTERS):
        raise RecordError(where, "options", "options", f"expected a list of up to 8, got {short(texts)}")
    options = dict(zip(LETTERS, map(str, texts), strict=False))
    if options and answer not in options:
        raise RecordError(where, "answer", "field", f"expected one of {', '.join(options)}, got {short(answer)}")
    folder = Path(where.file).parent
    if "decoded_image" in row:
        image = tables.shown(row["decoded_image"], where, "decoded_image")
    else:
        image = tables.text_of(row, "image", where)
        if not (folder / image).exists() and (folder.parent / image).exists():  # data/test.jsonl, images/1.jpg
            folder = folder.parent
    kind, category = "option" if options else "free", str(row.get("subject", ""))
    text = prompt(asked, options)
    return Question(index, text, (image,), answer, kind, folder, options=options, group=index, category=category)


def prompt(question: str, options: dict[str, str]) -> str:
    """The published prompt. Image tags in the text are left out, as the image stands before it."""
    question = re.sub(r"<image\d+>\s*", "", question).strip()
    listed = "".join(f"({letter}) {text}\n" for letter, text in options.items())
    wanted = "your final answer or a single letter (if it is a multiple choice question)"
    return (
        f'Please first solve the problem step by step, then put {wanted} in one "\\boxed{{}}". \n{question}\n{listed}'
    )


def cut(answer: str) -> tuple[str, bool]:
    """The part of an answer that the official rule compares, before it is cleaned, and whether something marked it."""
    text, marked = answer.strip(), False
    for c in "ABCDE":
        if text.endswith((f" {c}.", f" ({c}).")) or text.startswith((f"{c}\n", f"({c})\n", f"({c}) {c}\n")):
            text, marked = c, True
    tail = text.split("is ")[-1].rstrip(".")
    if _is_float(tail):
        text, marked = tail, True
    if "oxed{" not in text:
        for flag in _FLAGS:
            for written in (flag, flag.replace("the", "The")):
                found = written in text
                text = text.split(written)[-1].strip()
                if found:
                    text, marked = text.split("\n")[0].split(". ")[0], True
    else:
        marked = True
        if text.count("oxed{") > 1:
            text = "\\boxed{" + text.split("oxed{")[-1]
    return text, marked


def clean(text: str) -> str:
    """That part without its box, LaTeX around numbers, units and spaces, in lower case; of an equation its end. (The
    official rule also writes 0.5 and a/b as \\frac, which is the same number.)"""
    text = text.lower().replace("{}", "")
    if boxes := _LAST_BOX.findall(text):
        text = boxes[-1]
    closed, opened = text.find("}"), text.find("{")
    if closed >= 0 and (opened < 0 or closed < opened):
        text = text[:closed]
    text = text.split("=")[-1].split("\\approx")[-1].replace(" ", "").replace("∞", "\\infty")
    text = text.replace("+\\infty", "\\infty").replace("\\\\", "\\")
    for part in _DROPPED:
        text = text.replace(part, "")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac").replace("{.", "{0.")
    for letter in "abcde":
        text = text.replace(f"({letter})", letter).replace(f"{{{letter}}}", letter)
    return text.rstrip(".").lstrip(":").strip()


def equal(truth: str, answer: str, *, exact: bool) -> bool:
    """The official comparison: as strings, whatever the case; as tuples or lists; as numbers; to two decimals.

    Args:
        exact: only rational numbers count as numbers. lmms-eval's copy of the rule has no ``sqrt`` and no ``pi``: there
            2√3 equals nothing but the same string.
    """
    truth, answer = truth.lower(), answer.lower()
    if not truth.strip() or not answer.strip():
        return False
    if truth.strip() == answer.strip():
        return True
    truth, answer = _tuple(truth, exact), _tuple(answer, exact)
    if truth == answer:
        return True
    one, other = _number(truth, exact), _number(answer, exact)
    return one is not None and other is not None and round(float(one), 2) == round(float(other), 2)


def _tuple(text: str, exact: bool) -> str:
    """A tuple or list of numbers with these to two decimals; anything else as it is."""
    parts = text[1:-1].split(",")
    if len(parts) < 2 or _SEPARATORS.get(text[:1]) != text[-1:]:
        return text
    written = []
    for part in parts:
        if "infty" in part or part in ("a", "-a"):
            written.append(part)
            continue
        number = _number(part, exact)
        if number is None:
            return text
        written.append(str(round(float(number), 2)))
    return text[0] + ",".join(written) + text[-1]


def _number(text: str, exact: bool) -> arithmetic.Value | None:
    found = arithmetic.value(text)
    return None if exact and not isinstance(found, Fraction) else found


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def official(question: Question, answer: str, *, lmms_eval: bool = False) -> Reading:
    """The official rule, or lmms-eval's copy of it (see :func:`equal`; and the official one cannot read
    ``\\sqrt[3]{8}``, whose "[" it takes for what is under the root). An answer that nothing marks and that is neither a
    letter nor a number nor the truth is none."""
    text, marked = cut(answer)
    value = clean(text)
    truths = [question.answer, *([question.options[question.answer]] if question.options else [])]
    compared = value if lmms_eval or "\\sqrt[" not in value else value.replace("\\sqrt[", "\\sqrt{[}")
    right = any(equal(truth, compared, exact=lmms_eval) for truth in truths)
    known = marked or value.upper() in (question.options or ()) or arithmetic.value(value) is not None
    return Reading(value, right) if value and (right or known) else NOTHING


def vlmevalkit(question: Question, answer: str) -> Reading:
    """VLMEvalKit's: what stands in the first box, up to the first closing brace (of ``\\boxed{\\frac{1}{2}}`` that is
    ``\\frac{1``), or else the whole answer; an option as in MMBench; else equal as strings or as rational numbers
    within 1e-6 (roots and π have no value there). Without a box, what is neither the truth nor a number goes to its
    LLM."""
    box = _BOXED.search(answer)
    text = box[1] if box else answer
    if question.options:
        letter = choices.vlmevalkit(text, question.options)
        return NOTHING if letter is None else Reading(letter, letter == question.answer)
    one, other = arithmetic.value(question.answer), arithmetic.value(text.lower())
    right = text.lower().strip() == question.answer.lower().strip() or (
        isinstance(one, Fraction) and isinstance(other, Fraction) and abs(one - other) < Fraction(1, 10**6)
    )
    if not text.strip():
        return NOTHING
    return Reading(text.strip(), right) if right or box or other is not None else NOTHING


MATHVISION = Benchmark(
    "mathvision",
    ("mathvision",),
    "test",
    (".parquet", ".jsonl"),
    read,
    (
        Rule(
            "official",
            official,
            note='what follows "answer is" or stands in the last box, equal to letter, option or truth, numbers to two '
            "decimals",
        ),
        Rule(
            "VLMEvalKit",
            vlmevalkit,
            vlmevalkit,
            note="what stands in the first box up to its first brace, options as in MMBench, rational numbers within "
            "1e-6; an LLM for the rest",
        ),
        Rule(
            "lmms-eval",
            partial(official, lmms_eval=True),
            note="the official one, but roots and π are no numbers",
        ),
    ),
)

"""What sort of answer it was of which a rule extracted nothing."""

from __future__ import annotations

import re

from m4ov.evaluate.benchmarks.base import Question
from m4ov.evaluate.benchmarks.choices import letters_in, texts_in

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_REFUSAL = re.compile(
    r"\b(?:sorry|unable to|can(?:no|')t (?:\w+ )?(?:determine|help|see|answer|assist|process|view))", re.I
)
NOT_ASKED = "not asked"
#: In the order in which they are looked for.
KINDS = (
    *(
        NOT_ASKED,
        "no answer",
        "cut off",
        "refusal",
        "several letters",
        "a letter among words",
        "several options' texts",
    ),
    *("an option's text among words", "neither letter nor option", "no list", "a list among words", "no number"),
    *("a number among words", "several numbers"),
)


def kind_of(question: Question, answer: str, finish: str) -> str:
    """One of :data:`KINDS`.

    Args:
        finish: why the answer ended: ``"length"`` and ``"window"`` are cut off, ``"refused"`` was not asked.
    """
    if finish == "refused":
        return NOT_ASKED
    if not answer.strip():
        return "no answer"
    if finish in ("length", "window"):
        return "cut off"
    if _REFUSAL.search(answer):
        return "refusal"
    if question.options:
        letters, texts = letters_in(answer, question.options), texts_in(answer, question.options)
        if letters:
            return "a letter among words" if len(letters) == 1 else "several letters"
        if texts:
            return "an option's text among words" if len(texts) == 1 else "several options' texts"
        return "neither letter nor option"
    if question.kind == "list":
        return "a list among words" if re.search(r"\[[^\]]*\]", answer) else "no list"
    numbers = _NUMBER.findall(answer)
    if not numbers:
        return "no number"
    return "a number among words" if len(numbers) == 1 else "several numbers"

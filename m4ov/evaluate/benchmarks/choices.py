"""How tools find the option that an answer chooses. Each function gives a letter, or ``None``: nothing was found.

Written from the tools' published behaviour: the original MMBench script (of which lmms-eval's is a copy), VLMEvalKit's
(``matching_util`` as of 2025) and MMStar's. No tool's random guess is here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_BLANKED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SAID = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
_LAST = 4  # words, among which VLMEvalKit's letter must stand
# What lmms-eval lets stand around a letter, one after the other; a letter alone comes before all.
_AROUND = (
    *(("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ").")),
    *((":", ""), (":", ","), (":", "."), (":", ")"), (":", ").")),
)


def words(answer: str) -> list[str]:
    """The words of an answer, punctuation blanked."""
    return answer.translate(_BLANKED).split()


def letters_in(answer: str, letters: Iterable[str]) -> list[str]:
    """The letters that stand in an answer as words, each once."""
    found = set(words(answer))
    return [letter for letter in letters if letter in found]


def texts_in(answer: str, options: Mapping[str, str]) -> list[str]:
    """The letters of the options whose text stands in an answer, whatever its case."""
    lower = answer.lower()
    return [letter for letter, text in options.items() if text.lower() in lower]


def official(answer: str, options: Mapping[str, str]) -> str | None:
    """MMBench's: the only letter of an option that stands in the answer as a word; or else the only option whose text
    does, unless the answer is more than twice as long as all options together."""
    found = letters_in(answer, options)
    return found[0] if len(found) == 1 else only_text(answer, options)


def vlmevalkit(answer: str, options: Mapping[str, str]) -> str | None:
    """VLMEvalKit's: as :func:`official`, but the letter must be one of the last four words; then "answer is X" with X
    any of A to D, whatever its case and whatever follows ("the answer is a cat", "the answer is blue"); then the text.
    A refusal by one of four phrases, or a "Z" without an option's letter, chooses nothing."""
    if any(phrase in answer for phrase in _REFUSALS):
        return None
    split = words(answer)
    found = [letter for letter in options if letter in split]
    if len(found) == 1:
        if split.index(found[0]) >= len(split) - _LAST:
            return found[0]
    elif not found and "Z" in split:
        return None
    said = _SAID.search(answer)
    if said and said[1].upper() in options:
        return said[1].upper()
    return only_text(answer, options)


def lmms_eval(answer: str, options: Mapping[str, str]) -> str | None:
    """lmms-eval's for MMBench: the only one of the letters A to E (however many options there are) that is a word by
    itself, but none at all where an "A" stands among more than three words; then the only one with the same punctuation
    around it; then the only option whose text stands in the answer. An option that is missing has the text "nan", as in
    the data that it reads: an answer with "nan" in it ("banana") has several."""
    answer = answer.strip()
    split = answer.split()
    alone = [letter for letter in "ABCDE" if letter in split]
    if len(alone) == 1 and not ("A" in split and len(split) > 3):
        return alone[0]
    for before, after in _AROUND:
        found = [letter for letter in "ABCDE" if f"{before}{letter}{after}" in split]
        if len(found) == 1:
            return found[0]
    texts = texts_in(answer, {letter: options.get(letter, "nan") for letter in "ABCD"})
    return texts[0] if len(texts) == 1 else None


def leading(answer: str, options: Mapping[str, str]) -> str | None:
    """MMStar's, which looks at one character, whatever follows it: the first, or the one behind "(", "option " or "the
    answer is ". "Apples" and "a cat" choose A; "The answer is (B)" chooses nothing."""
    text = answer.lower().strip().replace("\n", " ")
    at = next((len(start) for start in ("(", "option ", "the answer is ") if text.startswith(start)), 0)
    letter = text[at : at + 1].upper()
    return letter if letter in options else None


def only_text(answer: str, options: Mapping[str, str]) -> str | None:
    """The only option whose text stands in an answer that is at most twice as long as all options together."""
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    found = texts_in(answer, options)
    return found[0] if len(found) == 1 else None

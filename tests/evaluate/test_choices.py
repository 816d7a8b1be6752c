"""Which option an answer chooses, worked by hand for each tool's rule; and what sort of answer chose none."""

from __future__ import annotations

import pytest

from m4ov.evaluate.benchmarks import choices
from m4ov.evaluate.benchmarks.base import NOTHING, Question, Reading
from m4ov.evaluate.benchmarks.failures import KINDS, kind_of

THREE = {"A": "a cat", "B": "a dog", "C": "a bird"}
COLOURS = {"A": "red", "B": "green", "C": "blue", "D": "yellow"}
LONG = "The animal stands in the grass, its ears are up, its tail is down, and so it must be"

# answer, options → official MMBench, VLMEvalKit, lmms-eval's MMBench, MMStar's character
CASES = [
    ("B", THREE, "B", "B", "B", "B"),
    ("(B)", THREE, "B", "B", "B", "B"),
    ("B. a dog", THREE, "B", "B", "B", "B"),
    ("b", THREE, None, None, None, "B"),  # MMStar alone looks at small letters
    ("Option B", THREE, "B", "B", "B", "B"),
    ("The answer is B", THREE, "B", "B", "B", "B"),
    ("The answer is (B)", THREE, "B", "B", "B", None),  # character 14 is "("
    ("The answer is: B.", THREE, "B", "B", "B", None),  # "The answer is" without a space behind it
    ("The correct answer is **B**", THREE, "B", "B", None, None),  # the asterisks of Markdown
    ("a dog", THREE, "B", "B", "B", "A"),  # the text; MMStar takes "a" for A
    ("It is a dog.", THREE, "B", "B", "B", None),
    ("Apples", THREE, None, None, None, "A"),
    ("a cat or a dog", THREE, None, None, None, "A"),  # two texts
    ("A or B", THREE, None, None, None, "A"),  # two letters, no text
    ("A dog is what I see", THREE, "A", "B", "B", "A"),  # an article; too far from the end for VLMEvalKit
    ("A dog, I think", THREE, "A", "A", "B", "A"),  # an article, near the end
    ("B because the tail of it is long", THREE, "B", None, "B", "B"),  # too far from the end
    ("E", THREE, None, None, "E", None),  # lmms-eval knows A to E, however many there are
    ("Z", THREE, None, None, None, None),
    ("Z a dog", THREE, "B", None, "B", None),  # VLMEvalKit's "none of them"
    ("Cannot determine the answer, B", THREE, "B", None, "B", "C"),  # a refusal in VLMEvalKit; MMStar sees its first c
    ("", THREE, None, None, None, None),
    (f"{LONG} a dog", THREE, None, None, "B", None),  # too long for a text, but not for lmms-eval
    ("the answer is blue", COLOURS, "C", "B", "C", "B"),  # "answer is b…" is B, says VLMEvalKit; MMStar too
    ("The answer is a red thing", COLOURS, "A", "A", "A", "A"),
    ("banana", {"A": "apple", "B": "banana"}, "B", "B", None, "B"),  # "nan", the text of a missing option
    ("B: a dog", THREE, "B", "B", "B", "B"),
    ("I say :B)", THREE, "B", "B", "B", None),
    ("(A) (B)", THREE, None, None, None, "A"),
    ("D", THREE, None, None, "D", None),  # an option that is not there
]


@pytest.mark.parametrize(("answer", "options", "official", "vlmevalkit", "lmms_eval", "leading"), CASES)
def test_by_hand(answer, options, official, vlmevalkit, lmms_eval, leading):
    assert choices.official(answer, options) == official
    assert choices.vlmevalkit(answer, options) == vlmevalkit
    assert choices.lmms_eval(answer, options) == lmms_eval
    assert choices.leading(answer, options) == leading


def test_no_rule_draws():
    """The same answer gives the same letter, or none, always: the tools' random letters are not here."""
    for answer, options, *_ in CASES:
        for rule in (choices.official, choices.vlmevalkit, choices.lmms_eval, choices.leading):
            assert len({rule(answer, options) for _ in range(20)}) == 1


def test_nothing_extracted_is_never_right():
    assert (NOTHING.value, NOTHING.right) == (None, False)
    with pytest.raises(ValueError, match="cannot be right"):
        Reading(None, True)


def question(kind: str = "option", options=THREE) -> Question:
    return Question("1", "?", (), "B", kind, options=options if kind == "option" else {})


@pytest.mark.parametrize(
    ("answer", "finish", "kind", "expected"),
    [
        ("", "stop", "option", "no answer"),
        (" \n", "length", "option", "no answer"),
        ("", "refused", "option", "not asked"),
        ("because", "length", "option", "cut off"),
        ("because", "window", "integer", "cut off"),
        ("I'm sorry, I can't help with that", "stop", "option", "refusal"),
        ("I cannot determine it", "stop", "float", "refusal"),
        ("A or B", "stop", "option", "several letters"),
        ("B because the tail of it is long", "stop", "option", "a letter among words"),
        ("a cat or a dog", "stop", "option", "several options' texts"),
        ("surely a dog", "stop", "option", "an option's text among words"),
        ("a horse", "stop", "option", "neither letter nor option"),
        ("seven", "stop", "integer", "no number"),
        ("7 apples", "stop", "integer", "a number among words"),
        ("3 + 4 = 7", "stop", "float", "several numbers"),
        ("between 3 and 4", "stop", "list", "no list"),
        ("it is [3, 4]", "stop", "list", "a list among words"),
    ],
)
def test_what_sort_of_answer(answer, finish, kind, expected):
    assert expected in KINDS
    assert kind_of(question(kind), answer, finish) == expected

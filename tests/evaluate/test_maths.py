"""Numbers and formulas by each tool's rule, worked by hand; the known traps of other tools' scoring among them."""

from __future__ import annotations

import math
import os
import random
from fractions import Fraction

import pytest

from m4ov.evaluate.benchmarks import arithmetic, mathvision, mathvista
from m4ov.evaluate.benchmarks.base import Question

CHOICES = {"A": "3/11", "B": "8/11", "C": "6/11", "D": "3/5"}


def numeric(kind: str, answer: str, precision: int | None = None) -> Question:
    return Question("1", "?", (), answer, kind, precision=precision)


def option(answer: str = "8/11") -> Question:
    return Question("1", "?", (), answer, "option", options=CHOICES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", 7),
        ("-3.50", Fraction(-7, 2)),
        (".5", Fraction(1, 2)),
        ("1e-2", Fraction(1, 100)),
        ("3/4", Fraction(3, 4)),
        (r"\frac{1}{2}", Fraction(1, 2)),
        (r"\frac12", Fraction(1, 2)),
        (r"-\dfrac{ 3 }{ 4 }", Fraction(-3, 4)),
        (r"2\cdot 3^2 - (1 + 1)**3", 10),
        (r"2 \times (3 + 4)", 14),
        ("2(3+4)", 14),
        ("2^-1", Fraction(1, 2)),
        ("-2^2", -4),
        (r"\sqrt{16}", 4),
        (r"\sqrt[3]{\frac{8}{27}}", Fraction(2, 3)),
        (r"\sqrt9", 3),
        (r"\left( 1 \right)", 1),
        ("$12$", 12),
    ],
)
def test_rational_values_are_exact(text, expected):
    found = arithmetic.value(text)
    assert isinstance(found, Fraction)
    assert found == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"2\sqrt{3}", 2 * math.sqrt(3)),
        (r"\frac{\pi}{2}", math.pi / 2),
        ("2^{0.5}", math.sqrt(2)),
        (r"3\pi", 3 * math.pi),
    ],
)
def test_other_values_are_floats(text, expected):
    found = arithmetic.value(text)
    assert isinstance(found, float)
    assert found == pytest.approx(expected, rel=1e-12)


NO_FORMULAS = (
    *("", "x", "2x", "1,000", "1 + ", "(1", "1)", "1/0", r"\sqrt{-1}", r"\frac{1}", "9^9^9^9", "10^5000", "(-8)^{0.5}"),
    *("3 4", "__import__('os').getpid()", "(" * 90, "1" * 200, r"\sqrt[0]{2}", "1e999", "3 apples", "--"),
    r"\sqrt{[}3]{8}",
)


@pytest.mark.parametrize("text", NO_FORMULAS)
def test_what_is_no_formula_has_no_value(text):
    assert arithmetic.value(text) is None


def test_no_text_breaks_the_reader():
    draw = random.Random(int(os.environ["M4OV_TEST_SEED"]))
    parts = [
        "\\frac",
        "\\sqrt",
        "\\pi",
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "^",
        "**",
        "+",
        "-",
        "/",
        "*",
        ".",
        "e",
        "0",
        "7",
        "12",
        " ",
    ]
    for _ in range(3000):
        text = "".join(draw.choices(parts, k=draw.randrange(1, 20)))
        found = arithmetic.value(text)
        assert found is None or math.isfinite(found), text


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("8/11", "6/11", 1), ("flaw", "lawn", 2)],
)
def test_edit_distance(one, other, expected):
    assert mathvista.distance(one, other) == mathvista.distance(other, one) == expected


# MathVista. Answer → (value, right) by: the official rule, VLMEvalKit's, lmms-eval's; all without a judge.
FAIL = (None, False)
WITHOUT_JUDGE = [
    (option(), "8/11", ("8/11", True), ("B", True), ("8/11", True)),
    (option(), "8/11\n", FAIL, ("B", True), ("8/11", True)),  # lmms-eval strips
    (option(), "B", FAIL, ("B", True), FAIL),  # officially a letter goes to the LLM
    (option(), "The answer is (C)", FAIL, ("C", False), FAIL),
    (option(), "", FAIL, FAIL, FAIL),  # not the shortest option
    (numeric("integer", "14"), "14", ("14", True), ("14", True), ("14", True)),
    (numeric("integer", "14"), " 14 ", ("14", True), ("14", True), ("14", True)),
    (numeric("integer", "14"), "15", ("15", False), ("15", False), ("15", False)),
    (numeric("integer", "0"), "0", ("0", True), ("0", True), ("0", True)),
    (numeric("integer", "14"), "14.0", FAIL, FAIL, FAIL),  # int("14.0") is none
    (numeric("integer", "14"), "It is 14.", FAIL, FAIL, FAIL),
    (numeric("float", "1.23", 2), "1.23", ("1.23", True), ("1.23", True), ("1.23", True)),
    (numeric("float", "1.23", 2), "1.2345", ("1.23", True), ("1.2345", False), ("1.23", True)),  # rounding skipped
    (numeric("float", "1.2", 1), "1.2000", ("1.2", True), ("1.2", True), ("1.2", True)),
    (numeric("float", "1.20", 2), "1.2", ("1.2", False), ("1.2", True), ("1.2", False)),  # officially strings
    (numeric("float", "2.0", 1), "2", ("2.0", True), ("2.0", True), ("2.0", True)),
    (numeric("list", "[2007, 2008]"), "[2007, 2008]", FAIL, FAIL, FAIL),
]
# The same with what a judge extracted.
WITH_JUDGE = [
    (option(), "B", ("8/11", True), ("B", True), ("8/11", True)),
    (option(), "(b) 8/11", ("8/11", True), ("B", True), ("8/11", True)),
    (option(), "8 / 11", ("8/11", True), FAIL, ("8/11", True)),  # the nearest option, by edit distance
    (option(), "  ", FAIL, FAIL, FAIL),
    (numeric("integer", "3"), "3.7", ("3", True), FAIL, ("3", True)),  # int(float()) cuts
    (numeric("integer", "3"), "three", FAIL, FAIL, FAIL),
    (numeric("integer", "3"), "inf", FAIL, FAIL, FAIL),
    (numeric("float", "0.6", 1), "0.649", ("0.6", True), ("0.649", False), ("0.6", True)),
    (numeric("list", "[2007, 2008]"), "[2007, 2008]", ("[2007, 2008]", True), FAIL, ("[2007, 2008]", True)),
    (numeric("list", "[2007, 2008]"), "[2007,2008]", ("[2007,2008]", False), FAIL, ("[2007,2008]", False)),
]


@pytest.mark.parametrize(("question", "answer", "official", "vlmevalkit", "lmms_eval"), WITHOUT_JUDGE)
def test_mathvista_without_a_judge(question, answer, official, vlmevalkit, lmms_eval):
    for rule, expected in (
        (mathvista.official, official),
        (mathvista.vlmevalkit, vlmevalkit),
        (mathvista.lmms_eval, lmms_eval),
    ):
        found = rule(question, answer)
        assert (found.value, found.right) == expected, rule.__name__


@pytest.mark.parametrize(("question", "extracted", "official", "vlmevalkit", "lmms_eval"), WITH_JUDGE)
def test_mathvista_of_what_a_judge_extracted(question, extracted, official, vlmevalkit, lmms_eval):
    expected = {"official": official, "VLMEvalKit": vlmevalkit, "lmms-eval": lmms_eval}
    for rule in mathvista.MATHVISTA.rules:
        found = rule.judged(question, extracted)
        assert (found.value, found.right) == expected[rule.name], rule.name


def test_an_answer_to_a_list_is_never_right_in_vlmevalkit():
    """It compares the truth with the text None: so even a list that is None is asked, and no other is right."""
    for truth in ("[1, 2]", "[]", "[0.5]"):
        assert mathvista.vlmevalkit(numeric("list", truth), truth) == mathvista.NOTHING


def free(answer: str) -> Question:
    return Question("1", "?", (), answer, "free")


LETTERS = Question("1", "?", (), "C", "option", options={"A": "5", "B": "6", "C": r"2\sqrt{3}", "D": "8", "E": "9"})
# MATH-Vision. Answer → right by: the official rule, VLMEvalKit's, lmms-eval's; None: nothing extracted.
MATHVISION = [
    (LETTERS, "C", True, True, True),
    (LETTERS, "The answer is (C).", True, True, True),
    (LETTERS, r"So \boxed{C}", True, True, True),
    (LETTERS, r"First \boxed{A}, but then \boxed{C}", True, False, True),  # the last box, and the first one
    (LETTERS, "C\nbecause of the angle", True, None, True),  # a line of its own; too far from the end
    (LETTERS, r"\boxed{2\sqrt{3}}", True, None, True),  # the option's text; VLMEvalKit's box ends at "2\sqrt{3"
    (LETTERS, r"\boxed{\sqrt{12}}", True, None, False),  # the same number; lmms-eval has no sqrt
    (LETTERS, "I do not know", None, None, None),
    (free("14"), "14", True, True, True),
    (free("14"), "14.0", True, True, True),
    (free("14"), "The value of x is 14.", True, None, True),  # behind "is "
    (free("14"), r"x = \boxed{14}", True, True, True),
    (free("14"), r"\boxed{x = 14}", True, False, True),  # of an equation its end
    (free("14"), r"\boxed{14 \text{ km}}", True, False, True),
    (free("14"), r"\boxed{13}", False, False, False),
    (free("0.5"), r"\boxed{\frac{1}{2}}", True, False, True),  # VLMEvalKit's box ends at the first brace
    (free("0.5"), r"\boxed{1/2}", True, True, True),
    (free("0.333"), r"\boxed{1/3}", True, False, True),  # two decimals, and 1e-6
    (free(r"\frac{1}{3}"), "0.3333333", True, True, True),
    (free(r"3\pi"), "9.42", True, False, False),  # π is a number officially alone
    (free("2"), r"\boxed{\sqrt[3]{8}}", False, False, True),  # officially the root's index is lost
    (free("2"), r"\boxed{\sqrt{4}}", True, False, True),
    (free("(1, 2)"), r"\boxed{(1,2)}", True, False, True),
    (free("(1, 2)"), r"\boxed{(\frac{2}{2}, 2.0)}", True, False, True),
    (free("60"), r"\boxed{60^{\circ}}", True, False, True),
    (free("7"), "It could be anything", None, None, None),
    (free("7"), "", None, None, None),
    (free("yes"), "Yes", True, True, True),
]


@pytest.mark.parametrize(("question", "answer", "official", "vlmevalkit", "lmms_eval"), MATHVISION)
def test_mathvision(question, answer, official, vlmevalkit, lmms_eval):
    expected = {"official": official, "VLMEvalKit": vlmevalkit, "lmms-eval": lmms_eval}
    for rule in mathvision.MATHVISION.rules:
        found = rule.read(question, answer)
        assert (None if found.value is None else found.right) == expected[rule.name], (rule.name, found)


def test_mathvision_asks_no_judge_but_vlmevalkits():
    assert [rule.judged is not None for rule in mathvision.MATHVISION.rules] == [False, True, False]

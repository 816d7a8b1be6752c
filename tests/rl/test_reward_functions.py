"""What each reward that comes with the package gives, and what it refuses."""

from __future__ import annotations

import math
import random
import time

import pytest

from m4ov.rl.rewards import BUILT_IN, Answer, RewardError, build
from m4ov.rl.rewards import answers as reading


def value(name, text, truth=None, tokens=(), finished=True, right=None, solve_rate=None, group_size=None, **options):
    function = build(name, options)
    answer = Answer(text, truth, tokens, finished, correct=right, solve_rate=solve_rate, group_size=group_size)
    found = function.call(answer)
    assert function.low <= found <= function.high
    return found


@pytest.mark.parametrize(
    ("text", "truth", "expected"),
    [
        ("Cat", "cat", 1),
        ("  a  red   circle. ", "A red circle", 1),
        ("I see it. The answer is: cat", "cat", 1),
        ("<think>dog</think><answer>cat</answer>", ["dog", "cat"], 1),
        ("<answer>dog</answer> no, <answer> cat </answer>", "cat", 1),
        ("so \\boxed{\\text{cat}}", "cat", 1),
        ("ﬁsh", "fish", 1),  # one character or two
        ("4", 4, 1),
        ("catfish", "cat", 0),
        ("", "cat", 0),
        ("the cat", "cat", 0),
    ],
)
def test_exact_match(text, truth, expected):
    assert value("exact-match", text, truth) == expected


def test_exact_match_of_the_whole_text_and_its_case():
    assert value("exact-match", "the answer is cat", "cat", whole=True) == 0
    assert value("exact-match", "Cat", "cat", ignore_case=False) == 0
    with pytest.raises(ValueError, match="ground_truth: expected a text"):
        value("exact-match", "cat", {"a": 1})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(C)", "C"),
        ("**D**", "D"),
        ("B. a dog", "B"),
        ("B: a dog", "B"),
        ("(B) a dog", "B"),
        ("The answer is B", "B"),
        ("The answer is (c).", "C"),
        ("I thought A. Final answer: option D because", "D"),
        ("<answer>A</answer>", "A"),
        ("\\boxed{E}", "E"),
        ("\\boxed{\\mathrm{A}}", "A"),
        ("A cat sits there", None),
        ("The answer is a cat", None),
        ("The answer is I do not know", None),
        ("Because", None),
        ("B and C are both right", None),
        ("", None),
        ("12", None),
    ],
)
def test_letters(text, expected):
    assert reading.letter(text) == expected
    if expected is not None:
        assert value("option-letter", text, expected) == 1
        assert value("option-letter", text, "Z") == 0


@pytest.mark.parametrize(
    ("text", "truth", "options", "expected"),
    [
        ("42", 42, {}, 1),
        ("there are 3 and 4, so the answer is 7 apples.", "7", {}, 1),
        ("1,234.5", 1234.5, {}, 1),
        ("$-1,234,567$", -1234567, {}, 1),
        ("−3", -3, {}, 1),
        ("x=-5", -5, {}, 1),
        ("3-5", 5, {}, 1),  # a range, not minus five
        ("1e-3", 0.001, {}, 1),
        ("3/4", 0.75, {}, 1),
        ("50%", 0.5, {}, 1),
        ("50 \\%", 50, {}, 1),
        ("0.5", "50%", {}, 1),
        (".25", 0.25, {}, 1),
        ("3.", 3, {}, 1),
        ("1, 2", 2, {}, 1),
        ("3.1", 3, {}, 0),
        ("3.1", 3, {"absolute": 0.1000001}, 1),
        ("103", 100, {"relative": 0.03}, 1),
        ("103.1", 100, {"relative": 0.03}, 0),
        ("1/0", 1, {}, 0),
        ("1e999", 1, {}, 0),
        ("none at all", 0, {}, 0),
        ("", 0, {}, 0),
    ],
)
def test_numbers(text, truth, options, expected):
    assert value("number", text, truth, **options) == expected


def test_a_ground_truth_that_is_no_number_is_said():
    for truth in (None, "many", True, float("nan")):
        with pytest.raises(ValueError, match="ground_truth: expected a number"):
            value("number", "3", truth)


@pytest.mark.parametrize(
    ("text", "truth", "expected"),
    [
        ("$\\frac{1}{2}$", "1/2", 1),
        ("The answer is $x^2 + 2x + 1$", "(x+1)^2", 1),
        ("so \\boxed{\\sqrt{8}}", "$2\\sqrt{2}$", 1),
        ("<think>$5$</think><answer>$7$</answer>", "7", 1),
        ("$0.333$", "1/3", 0),
        ("no formula", "1", 0),
    ],
)
def test_maths(text, truth, expected):
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    assert value("math", text, truth) == expected


def test_maths_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RewardError, match=r'math: math needs the package math-verify; pip install "m4ov\[rl\]"'):
        build("math", {})


BOX = [0, 0, 10, 10]


@pytest.mark.parametrize(
    ("text", "truth", "options", "expected"),
    [
        ("[0, 0, 10, 10]", BOX, {}, 1),
        ('{"bbox_2d": [0, 0, 10, 5]}', BOX, {}, 0.5),
        ("(10, 10, 0, 0)", BOX, {}, 1),  # corners the other way round
        ("the answer is:\n[\n [0,0,5,10]\n]", BOX, {}, 0.5),
        ("[20, 20, 30, 30]", BOX, {}, 0),
        ("[0,0,0,0]", [0, 0, 0, 0], {}, 0),
        ("[0,0,10,10] [0,0,10,10]", BOX, {}, 0.5),  # more boxes do not pay
        ("[0,0,10,10] " * 100, BOX, {}, 0.01),
        ("[20,0,30,10] [0,0,10,10]", [BOX, [20, 0, 30, 10]], {}, 1),
        ("[20,0,30,10]", [BOX, [20, 0, 30, 10]], {}, 0.5),
        ("[0,0,10,5]", BOX, {"threshold": 0.5}, 1),
        ("[0,0,10,4]", BOX, {"threshold": 0.5}, 0),
        ("[0,0,10,10] [1,1,2,2]", BOX, {"threshold": 0.5}, 0),
        ("[1e999, 0, 1, 1]", BOX, {}, 0),
        ("", BOX, {}, 0),
    ],
)
def test_boxes(text, truth, options, expected):
    assert value("iou", text, truth, **options) == pytest.approx(expected, abs=1e-12)


def test_a_ground_truth_that_is_no_box_is_said():
    for truth in (None, [1, 2, 3], "0,0,1,1", [[1, 2, 3, 4], [1, 2]], []):
        with pytest.raises(ValueError, match="ground_truth: expected boxes"):
            value("iou", "[0,0,1,1]", truth)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        (" <think>\na\n</think>\n\n<answer>b</answer>\n", 1),
        ("<think>a</think>so<answer>b</answer>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a</think><answer>b</answer>.", 0),
        ("<think> </think><answer>b</answer>", 0),
        ("<think>a<answer>b</answer></think>", 0),
        ("<think>a</think><answer>b</answer><answer>b</answer>", 0),
        ("</think>a<think><answer>b</answer>", 0),
        ("", 0),
    ],
)
def test_form_of_tags(text, expected):
    assert value("format", text, tags=["think", "answer"]) == expected


def test_form_of_a_pattern():
    assert value("format", "a\nb", pattern="a.b") == 1
    assert value("format", "a\nbc", pattern="a.b") == 0
    assert build("format", {"pattern": "(a+)+b"}).seconds > 0  # which may take for ever
    assert build("format", {"tags": ["a"]}).seconds == 0


def test_lengths():
    lengths = (0, 60, 80, 90, 100, 5000)
    found = [value("overlong", "", tokens=range(n), max_length=100, cache_length=20) for n in lengths]
    assert found == [0, 0, 0, -0.5, -1, -1]
    options = {"max_length": 10, "correct": [2.0, 1.0], "wrong": [-10.0, 0.0], "exceeded": -10.0}
    for n in range(11):
        half = (1 + math.cos(math.pi * n / 10)) / 2
        assert value("cosine", "", tokens=range(n), right=True, **options) == pytest.approx(1 + half)
    assert value("cosine", "", tokens=range(0), right=False, **options) == -10
    assert value("cosine", "", tokens=range(10), right=False, **options) == pytest.approx(0, abs=1e-12)
    assert value("cosine", "", tokens=range(11), right=True, **options) == -10
    assert value("cosine", "", tokens=range(3), right=True, finished=False, **options) == -10

    def alp(n, rate):
        known = {"solve_rate": rate, "group_size": 8}
        return value("adaptive-length", "", tokens=range(n), max_length=100, beta=0.4, **known)

    assert alp(50, 1.0) == pytest.approx(-0.2)
    assert alp(50, 0.5) == pytest.approx(-0.1)
    assert alp(50, 0.0) == pytest.approx(-0.4 / 8 / 2)  # not for nothing where none is right
    assert alp(1000, 1.0) == pytest.approx(-0.4)
    with pytest.raises(ValueError, match="solve_rate: known only where a group"):
        value("adaptive-length", "", max_length=10)


def test_repetition():
    assert value("repetition", "", tokens=[1, 2, 3], size=4) == 0
    assert value("repetition", "", tokens=range(100)) == 0
    assert value("repetition", "", tokens=[7] * 103, size=4) == pytest.approx(1 / 100 - 1)
    assert value("repetition", "", tokens=[1, 2, 1, 2, 1], size=2) == pytest.approx(2 / 4 - 1)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "math"])
def test_no_text_raises_or_takes_long(name):
    """What a sampler may write: anything, and long. Those that run in the trainer must be quick for it."""
    options = {
        "format": {"tags": ["a"]},
        "overlong": {"max_length": 10, "cache_length": 5},
        "cosine": {"max_length": 10},
        "adaptive-length": {"max_length": 10},
    }.get(name, {})
    truth = {"number": 1, "iou": BOX, "option-letter": "A"}.get(name, "cat")
    pieces = ["\\boxed{", "<answer>", "</answer>", "answer is ", "[1,", "1,111,", *"( \nA%9.-{}"]
    texts = [piece * 20_000 for piece in pieces] + ["".join(random.choices(pieces, k=20_000)) for _ in range(5)]
    function = build(name, options)
    began = time.perf_counter()
    for text in texts:
        found = function.call(Answer(text, truth, range(3000), correct=True, solve_rate=1.0, group_size=1))
        assert function.low <= found <= function.high
    assert time.perf_counter() - began < 20  # a quadratic one takes minutes


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("exact", {}, "no reward is named 'exact'; did you mean exact-match?"),
        ("number", {"absolut": 1}, "options.absolut: no such option; did you mean absolute?"),
        ("number", {"absolute": -1}, "number: absolute: expected a finite number, at least 0"),
        ("overlong", {"max_length": 10}, "overlong: .*cache_length"),
        ("overlong", {"max_length": 10, "cache_length": 11}, "cache_length: expected at most max_length"),
        ("overlong", {"max_length": 1.5, "cache_length": 1}, "max_length: expected a whole number"),
        ("cosine", {"max_length": 10, "correct": [1]}, "correct: expected two numbers"),
        ("format", {}, "tags, pattern: expected one of them"),
        ("format", {"pattern": "("}, "pattern: not a regular expression"),
        ("format", {"tags": ["<a>"]}, "tags: expected names"),
        ("iou", {"threshold": 2}, "threshold: expected 0 to 1"),
        ("no.such.module:f", {}, "no.such.module cannot be imported"),
        ("tests.rl.reward_functions:lenght_share", {}, "has no lenght_share; did you mean length_share?"),
        ("tests.rl.reward_functions:NOT_A_FUNCTION", {}, "is no function but int"),
        ("tests.rl.reward_functions:length_share", {"least": 1}, "options: .*least"),
        ("tests.rl.reward_functions:undeclared", {}, "expected a declared range"),
    ],
)
def test_what_is_refused(name, options, message):
    with pytest.raises(RewardError, match=message):
        build(name, options)


def test_a_declared_range_is_the_configurations():
    function = build("tests.rl.reward_functions:undeclared", {}, low=0, high=2)
    assert (function.low, function.high, function.call(Answer("x"))) == (0, 2, 1)
    with pytest.raises(RewardError, match="expected a range of two finite numbers"):
        build("tests.rl.reward_functions:undeclared", {}, low=1, high=0)

"""The reward functions that come with the package. Each is made with its options, and knows its range."""

from __future__ import annotations

import importlib.util
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from m4ov.rl.rewards import answers
from m4ov.rl.rewards.answers import Answer


@dataclass(frozen=True)
class Function:
    """A reward of one answer.

    Attributes:
        call: the value of an answer; may raise.
        low, high: the range of its values, declared: what lies outside is a failure.
        group: whether it asks for ``correct``, ``solve_rate`` and ``group_size``.
        seconds: for one answer, in a process of its own, because it may hang; 0: it cannot, and runs here.
    """

    call: Callable[[Answer], float]
    low: float
    high: float
    group: bool = False
    seconds: float = 0.0


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a whole number, at least 1, got {value!r}")


def _numbers(least: float = -math.inf, **values: Any) -> None:
    for name, value in values.items():
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= least
        if not ok:
            expected = "a finite number" + (f", at least {least:g}" if least > -math.inf else "")
            raise ValueError(f"{name}: expected {expected}, got {value!r}")


def exact_match(*, whole: bool = False, ignore_case: bool = True) -> Function:
    """1 where the answer is the ground truth, or one of them if that is a list, else 0. Unicode forms, spaces and
    a full stop at the end make no difference.

    Args:
        whole: compare the whole text, not only the part of it that answers.
        ignore_case: "Cat" is "cat".
    """

    def plain(text: Any) -> str:
        found = " ".join(unicodedata.normalize("NFKC", str(text)).split())
        found = found.removesuffix(".").rstrip()
        return found.casefold() if ignore_case else found

    def call(answer: Answer) -> float:
        truth = answer.ground_truth
        accepted = truth if isinstance(truth, list | tuple) else [truth]
        if not accepted or any(not isinstance(one, str | int | float) for one in accepted):
            raise ValueError(f"ground_truth: expected a text or a list of texts, got {truth!r}")
        text = answer.text if whole else answers.answered(answer.text)
        return float(plain(text) in {plain(one) for one in accepted})

    return Function(call, 0.0, 1.0)


def option_letter() -> Function:
    """1 where the answer chooses the option whose letter is the ground truth, else 0 (``answers.letter`` has rules)."""

    def call(answer: Answer) -> float:
        truth = answer.ground_truth
        if not isinstance(truth, str) or not re.fullmatch(r"\(?[A-Za-z]\)?", truth.strip()):
            raise ValueError(f"ground_truth: expected a letter, got {truth!r}")
        return float(answers.letter(answer.text) == truth.strip(" ()").upper())

    return Function(call, 0.0, 1.0)


def number(*, absolute: float = 0.0, relative: float = 1e-6) -> Function:
    """1 where the answer's last number x is the ground truth t: ``|x − t| ≤ max(absolute, relative · |t|)``, else 0.
    "50%" is 0.5 or 50, as it fits."""
    _numbers(0.0, absolute=absolute, relative=relative)

    def call(answer: Answer) -> float:
        truths = answers.true_readings(answer.ground_truth)
        found = answers.readings(answer.text)
        return float(any(abs(x - t) <= max(absolute, relative * abs(t)) for t in truths for x in found))

    return Function(call, 0.0, 1.0)


def maths(*, precision: int = 6) -> Function:
    """1 where math-verify finds the answer, LaTeX or plain, equal to the ground truth, else 0; of a text without tags
    the last formula. Its computer algebra may take for ever, so it has 5 seconds in a process of its own.

    Args:
        precision: decimals to which numbers are compared.

    Raises:
        ValueError: math-verify is not installed.
    """
    _positive("precision", precision)
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError('math needs the package math-verify; pip install "m4ov[rl]"')

    def call(answer: Answer) -> float:
        # Its own time limits are signals, and ours must be able to end a process that ignores them.
        import logging

        from math_verify import parse, verify

        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        truth = str(answer.ground_truth)
        gold = parse(truth if "$" in truth or "\\boxed" in truth else f"${truth}$", parsing_timeout=None)
        if not gold:
            raise ValueError(f"ground_truth: expected what math-verify can read, got {answer.ground_truth!r}")
        end = answer.text.rfind("</answer>")
        begin = answer.text.rfind("<answer>", 0, max(end, 0))
        text = answer.text if begin < 0 else answer.text[begin + len("<answer>") : end]
        found = parse(text, parsing_timeout=None)
        return float(verify(gold, found, float_rounding=precision, timeout_seconds=None))

    return Function(call, 0.0, 1.0, seconds=5.0)


def box_iou(*, threshold: float = 0.0) -> Function:
    """Intersection over union of the answer's boxes with those of the ground truth: over the matching with the largest
    sum, divided by the larger number of boxes, so that neither missing nor more boxes pay.

    Args:
        threshold: above 0: 1 where every box is there with at least this IoU, and no other, else 0.
    """
    _numbers(0.0, threshold=threshold)
    if threshold > 1:
        raise ValueError(f"threshold: expected 0 to 1, got {threshold!r}")

    def call(answer: Answer) -> float:
        truths, found = answers.as_boxes(answer.ground_truth), answers.boxes(answer.text)
        if not found:
            return 0.0
        if threshold and len(found) != len(truths):
            return 0.0
        count = max(len(truths), len(found))
        found = found[: 8 * len(truths)]  # a list without end is no matching without end; nor does it pay
        table = [[answers.iou(truth, box) for box in found] for truth in truths]
        if len(truths) == 1:
            matched = [max(table[0])]
        else:
            from scipy.optimize import linear_sum_assignment

            rows, columns = linear_sum_assignment(table, maximize=True)
            matched = [table[row][column] for row, column in zip(rows, columns, strict=True)]
        if threshold:
            return float(min(matched) >= threshold)
        return sum(matched) / count

    return Function(call, 0.0, 1.0)


def form(*, tags: Sequence[str] = (), pattern: str = "") -> Function:
    """1 where the whole text has the form that is asked for, else 0.

    Args:
        tags: names: the text is ``<first>…</first><second>…</second>…``, each once, in this order, each with something
            in it, nothing but spaces between and around.
        pattern: or a regular expression that the whole text must match; "." is any character. As one may take for ever,
            it has a second in a process of its own.
    """
    tags = [tags] if isinstance(tags, str) else list(tags)
    if bool(tags) == bool(pattern):
        raise ValueError(f"tags, pattern: expected one of them, got tags={tags!r}, pattern={pattern!r}")
    if not all(isinstance(tag, str) and re.fullmatch(r"[\w-]+", tag) for tag in tags):
        raise ValueError(f"tags: expected names, got {tags!r}")
    if pattern:
        try:
            compiled = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern: not a regular expression ({error}): {pattern!r}") from None
        return Function(lambda answer: float(compiled.fullmatch(answer.text) is not None), 0.0, 1.0, seconds=1.0)

    def call(answer: Answer) -> float:
        place, text = 0, answer.text
        for tag in tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            if text.count(opening) != 1 or text.count(closing) != 1:
                return 0.0
            begin, end = text.index(opening), text.index(closing)
            if begin < place or text[place:begin].strip() or not text[begin + len(opening) : end].strip():
                return 0.0
            place = end + len(closing)
        return float(not text[place:].strip())

    return Function(call, 0.0, 1.0)


def overlong(*, max_length: int, cache_length: int) -> Function:
    """DAPO's soft overlong punishment: 0 up to ``max_length − cache_length`` tokens, from there in a straight line to
    −1 at ``max_length`` and beyond. Source: arXiv 2503.14476."""
    _positive("max_length", max_length)
    _positive("cache_length", cache_length)
    if cache_length > max_length:
        raise ValueError(f"cache_length: expected at most max_length = {max_length}, got {cache_length}")

    def call(answer: Answer) -> float:
        return max(-1.0, min(0.0, (max_length - cache_length - answer.length) / cache_length))

    return Function(call, -1.0, 0.0)


def cosine(
    *,
    max_length: int,
    correct: Sequence[float] = (1.0, 0.5),
    wrong: Sequence[float] = (-1.0, -0.5),
    exceeded: float = -1.0,
) -> Function:
    """Length-scaled reward: from its first value at 0 tokens along half a cosine to its second at ``max_length``:
    ``end + ½ (start − end)(1 + cos(π L / L_max))``. A right answer should be short, a wrong one had better think on.

    Args:
        correct, wrong: start and end of right and of wrong answers.
        exceeded: the value of an answer that is cut, or longer.

    Source: Yeo et al., "Demystifying long chain-of-thought reasoning in LLMs", arXiv 2502.03373.
    """
    _positive("max_length", max_length)
    for name, pair in (("correct", correct), ("wrong", wrong)):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"{name}: expected two numbers, start and end, got {pair!r}")
        _numbers(**{f"{name}[0]": pair[0], f"{name}[1]": pair[1]})
    _numbers(exceeded=exceeded)
    values = [float(value) for value in (*correct, *wrong, exceeded)]

    def call(answer: Answer) -> float:
        if answer.length > max_length or not answer.finished:
            return values[4]
        start, end = values[:2] if answer.correct else values[2:4]
        return end + (start - end) / 2 * (1 + math.cos(math.pi * answer.length / max_length))

    return Function(call, min(values), max(values), group=True)


def adaptive_length(*, max_length: int, beta: float = 1.0) -> Function:
    """ALP's penalty: ``−β · max(p, 1/K) · min(L / L_max, 1)``, with p the share of right answers of the K to the same
    prompt: tokens cost most where the prompt is easy. Source: arXiv 2506.05256 (whose ``1[ok]`` is another component).
    """
    _positive("max_length", max_length)
    _numbers(0.0, beta=beta)

    def call(answer: Answer) -> float:
        if answer.solve_rate is None or not answer.group_size:
            raise ValueError("solve_rate: known only where a group of answers is rewarded, got none")
        return -beta * max(answer.solve_rate, 1 / answer.group_size) * min(answer.length / max_length, 1.0)

    return Function(call, -float(beta), 0.0, group=True)


def repetition(*, size: int = 4) -> Function:
    """Minus the share of n-grams of tokens that stand somewhere before in the answer: 0 where none repeats, nearly −1
    in a loop. Source: the n-gram penalty of arXiv 2502.03373, as a share.

    Args:
        size: tokens of an n-gram.
    """
    _positive("size", size)

    def call(answer: Answer) -> float:
        count = answer.length - size + 1
        if count < 1:
            return 0.0
        tokens = tuple(answer.tokens)
        return len({tokens[place : place + size] for place in range(count)}) / count - 1.0

    return Function(call, -1.0, 0.0)

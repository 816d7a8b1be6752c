"""An answer to be rewarded, and what is read out of its text: the part that answers, letters, numbers, boxes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Answer:
    """One answer, all that a reward may depend on; it crosses to other processes as JSON.

    Attributes:
        text: decoded, without special tokens.
        ground_truth: of the record's ``reward``; any JSON.
        tokens: the ids of the answer, its end token included.
        finished: it ended by itself; ``False``: it was cut at the most tokens.
        question: the text that was asked.
        extra: anything else that the record's ``reward`` has.
        correct: whether it is right; ``solve_rate``: the share of right answers to the same prompt; ``group_size``: how
            many these are. Known to functions that ask for the group.
    """

    text: str
    ground_truth: Any = None
    tokens: Sequence[int] = ()
    finished: bool = True
    question: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    correct: bool | None = None
    solve_rate: float | None = None
    group_size: int | None = None

    @property
    def length(self) -> int:
        """In tokens."""
        return len(self.tokens)

    def to_line(self) -> str:
        """JSON on one line."""
        return json.dumps({**asdict(self), "tokens": list(self.tokens)})

    @classmethod
    def from_line(cls, line: str | bytes) -> Answer:
        return cls(**json.loads(line))


_BRACES = re.compile(r"\\boxed\{|\\[{}]|[{}]")
_SAID = re.compile(r"\banswer\s*(?:is|:|=)\s*(?::\s*)?", re.IGNORECASE)
_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_BARE = re.compile(r"\W*([A-Za-z])\W*")
_FIRST = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])[.):])(?=\s|$)")
_AFTER = re.compile(r"\W{0,3}(?:option\s+)?\(?([A-Z])\)?(?![\w'])", re.IGNORECASE)
_ARTICLE = re.compile(r"\W{0,3}[AaIi]\s+[a-z]")  # or "I"
# Digits in groups of three or not, an exponent, a denominator, a percent sign. A hyphen between two words is no sign.
_NUMBER = re.compile(
    r"(?<![\w.])([-+−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-+−]?\.\d+)(?:[eE]([-+]?\d{1,3})(?!\d))?"
    r"(?:\s*/\s*(\d+(?:\.\d+)?))?(\s*\\?%)?"
)
_BOX = re.compile(r"[\[(]\s*([-+.\deE]+)\s*,\s*([-+.\deE]+)\s*,\s*([-+.\deE]+)\s*,\s*([-+.\deE]+)\s*[\])]")


def answered(text: str, *, line: bool = True) -> str:
    """The part of a text that is the answer: what the last ``<answer>`` holds, in it or else anywhere the last
    ``\\boxed``, else what stands behind the last "answer is" or "answer:" (``line``: on its line), else all of it."""
    end = text.rfind("</answer>")
    begin = text.rfind("<answer>", 0, max(end, 0))
    tagged = begin >= 0
    if tagged:
        text = text[begin + len("<answer>") : end]
    inside = boxed(text)
    if inside is not None:
        return _WORDS.sub(r"\1", inside).strip()
    if not tagged:
        said = list(_SAID.finditer(text))
        if said:
            rest = text[said[-1].end() :].strip()
            return rest.splitlines()[0].strip() if rest and line else rest
    return text.strip()


def boxed(text: str) -> str | None:
    """What the last ``\\boxed{…}`` holds, braces inside it balanced; ``None``: there is none that is closed."""
    found: tuple[int, int] | None = None
    open_braces: list[int | None] = []  # where a box's content begins; None: another brace
    for match in _BRACES.finditer(text):
        if match[0] == "\\boxed{" or match[0] == "{":
            open_braces.append(None if match[0] == "{" else match.end())
        elif match[0] == "}" and open_braces:
            begin = open_braces.pop()
            if begin is not None and (found is None or begin > found[0]):
                found = begin, match.start()
    return None if found is None else text[found[0] : found[1]]


def letter(text: str) -> str | None:
    """The option, ``"A"`` to ``"Z"``, that a text chooses: a letter alone, in brackets or before "." or ")", else one
    behind the last "answer is"; ``None``: it chooses none. "A cat" chooses none."""
    part = answered(text)
    bare = _BARE.fullmatch(part)
    if bare:
        return bare[1].upper()
    first = _FIRST.match(part)
    if first:
        return first[1] or first[2]
    if part != text.strip():
        after = _AFTER.match(part)
        if after and not _ARTICLE.match(part):
            return after[1].upper()
    return None


def readings(text: str) -> tuple[float, ...]:
    """The last number in the part of a text that answers: ``-1,234.5``, ``3/4``, ``1e-3``; ``50%`` may be 0.5 or 50.
    Empty: there is none that is finite."""
    found: tuple[float, ...] = ()
    for match in _NUMBER.finditer(answered(text).replace("$", "")):
        digits, exponent, below, percent = match.groups()
        try:
            value = float(digits.replace(",", "").replace("−", "-") + (f"e{exponent}" if exponent else ""))
            value = value / float(below) if below else value
        except (ValueError, ZeroDivisionError):
            continue
        if math.isfinite(value):
            found = (value / 100, value) if percent else (value,)
    return found


def true_readings(value: Any) -> tuple[float, ...]:
    """The same of a ground truth: a number, or a text with one.

    Raises:
        ValueError: it is none.
    """
    found: tuple[float, ...] = ()
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        found = (float(value),)
    elif isinstance(value, str):
        found = readings(value)
    if not found:
        raise ValueError(f"ground_truth: expected a number, got {value!r}")
    return found


def boxes(text: str) -> list[Box]:
    """All boxes ``[x0, y0, x1, y1]`` in the part of a text that answers, as JSON or in brackets, corners in order."""
    found = []
    for match in _BOX.finditer(answered(text, line=False)):
        try:
            x0, y0, x1, y1 = map(float, match.groups())
        except ValueError:
            continue
        if all(map(math.isfinite, (x0, y0, x1, y1))):
            found.append((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)))
    return found


def as_boxes(value: Any) -> list[Box]:
    """A ground truth as boxes: one, or a list of them.

    Raises:
        ValueError: it is neither.
    """
    rows = value if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple) else [value]
    found = []
    for row in rows:
        ok = isinstance(row, list | tuple) and len(row) == 4
        if not ok or not all(isinstance(x, int | float) and math.isfinite(x) for x in row):
            raise ValueError(f"ground_truth: expected boxes [x0, y0, x1, y1], got {value!r}")
        x0, y0, x1, y1 = map(float, row)
        found.append((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)))
    return found


def iou(first: Box, second: Box) -> float:
    """Intersection over union; 0 where both are empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)) - shared
    return shared / union if union > 0 else 0.0

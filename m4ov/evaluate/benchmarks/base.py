"""What a benchmark is: questions, the rules by which answers to them are read, and what is made of the verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from m4ov.evaluate.intervals import Share, micro

#: What an answer is: ``option``: a letter, or an option's text; a number; a list; ``free``: a number or a formula.
KINDS = ("option", "integer", "float", "list", "free")


@dataclass(frozen=True, eq=False)
class Question:
    """One question as it is asked.

    Attributes:
        id: unique in its benchmark.
        text: the prompt, behind the images.
        images: each a ``data:`` URI, or a path relative to ``folder``.
        answer: the truth: a letter where ``options`` are MMBench's, MMStar's and MathVision's; the option's text in
            MathVista; else the answer itself.
        kind: one of :data:`KINDS`.
        options: letter → text; empty: none.
        group: of questions that are judged together (MMBench's rotations); the ``id`` of its first.
        category: that results are shown by.
        precision: decimals of a MathVista number.
    """

    id: str
    text: str
    images: tuple[str, ...]
    answer: str
    kind: str
    folder: Path = Path()
    options: Mapping[str, str] = field(default_factory=dict)
    group: str = ""
    category: str = ""
    precision: int | None = None


@dataclass(frozen=True)
class Reading:
    """What a rule makes of an answer.

    Attributes:
        value: what was extracted; ``None``: nothing, which is a wrong answer and counted as an extraction failure.
        right: whether that is the truth.
    """

    value: str | None
    right: bool

    def __post_init__(self) -> None:
        if self.value is None and self.right:
            raise ValueError("Reading: an answer of which nothing was extracted cannot be right")


NOTHING = Reading(None, False)
Metric = Callable[[Sequence[Question], Sequence[bool]], Share]


def answers_alike(questions: Sequence[Question], right: Sequence[bool]) -> Share:
    """All questions alike."""
    return micro(right)


@dataclass(frozen=True)
class Rule:
    """How one tool reads answers.

    Attributes:
        name: of the tool.
        read: of a question and the model's whole answer.
        judged: of a question and the answer that a judge extracted, where ``read`` extracted nothing; ``None``: the
            tool has no judge.
        metrics: name (empty: the only one) → the share that the tool reports.
        note: what it does, for readers of the report.
    """

    name: str
    read: Callable[[Question, str], Reading]
    judged: Callable[[Question, str], Reading] | None = None
    metrics: Mapping[str, Metric] = field(default_factory=lambda: {"": answers_alike})
    note: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: as the command has it.
        names: that a path of its files contains, letters and digits alone, in lower case.
        split: that is taken where a folder has several.
        suffixes: of its files.
        read: its files → its questions.
        rules: the official one first.
        blind: whether every question is asked without its image too.
        note: of questions what is not as published; empty: nothing.
    """

    name: str
    names: tuple[str, ...]
    split: str
    suffixes: tuple[str, ...]
    read: Callable[[Sequence[Path]], list[Question]]
    rules: tuple[Rule, ...]
    blind: bool = False
    note: Callable[[Sequence[Question]], str] = lambda questions: ""

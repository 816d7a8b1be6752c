"""Questions that take a short chain of steps, on grids of real images, with answers that can be verified.

A grid of two by two holds scans of digits (scikit-learn's; two to four of them) or figures (easy-vqa's; four of them).
To answer, its places must be read and something must be made of what stands there: added, compared, counted, located.
Each chain is spelled in :data:`STYLES`, from every step to none; all end in ``Answer: …``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from m4ov.data.images import to_square
from m4ov.data.sources import DataError, Sample, Split, digits, easy_vqa

STYLES = ("long", "short", "direct")
PLACES = ("top left", "top right", "bottom left", "bottom right")
KINDS = ("sum", "difference", "largest", "count", "compare", "locate")
_SHAPES = ("circle", "rectangle", "triangle")
_NEGATED = (" not ", "is no ")


class Problem(NamedTuple):
    """A question on one grid.

    Attributes:
        image: its index.
        truth: the final answer.
        kind: one of :data:`KINDS`.
        spelled: the whole answer in each of :data:`STYLES`.
    """

    image: int
    question: str
    truth: str
    kind: str
    spelled: tuple[str, ...]


@dataclass(frozen=True)
class Chains:
    """Grids, uint8 ``[N, size, size, 3]``, and problems on them, grouped by grid, in order."""

    images: np.ndarray
    problems: tuple[Problem, ...]

    def split(self, name: str, shares: Mapping[str, float], seed: int) -> Split:
        """As samples to be imitated, each answer spelled in a style that is drawn with these shares.

        Raises:
            ValueError: a share is of no style, or below 0; or all are 0.
        """
        weights = [float(shares.get(style, 0.0)) for style in STYLES]
        if not shares.keys() <= set(STYLES) or min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise ValueError(
                f"styles: expected shares of {', '.join(STYLES)}, at least one above 0; got {dict(shares)}"
            )
        random = np.random.default_rng([seed, 31])
        drawn = random.choice(len(STYLES), len(self.problems), p=np.array(weights) / sum(weights))
        samples = (
            Sample(problem.image, problem.question, problem.spelled[style], problem.kind)
            for problem, style in zip(self.problems, drawn, strict=True)
        )
        return Split(name, self.images, tuple(samples))


def chains(
    part: str,
    size: int,
    *,
    grids: int,
    questions: int,
    held_out_digits: int,
    split_seed: int = 0,
    seed: int = 0,
    easy_vqa_folder: str = "",
    on_bad_image: str = "refuse",
) -> Chains:
    """Grids and problems, the first half of figures and the rest of digits.

    Args:
        part: ``"train"``, or ``"test"``: of easy-vqa's test images and the held-out scans.
        size: pixels a side of a grid, even.
        questions: on each grid at most.
        held_out_digits, split_seed: see :func:`m4ov.data.digits`.
        seed: of what stands in the grids and is asked.
        easy_vqa_folder, on_bad_image: see :func:`m4ov.data.easy_vqa`.

    Raises:
        DataError: a package is missing, or its data are broken.
        ValueError: an argument is out of range.
    """
    if part not in ("train", "test"):
        raise ValueError(f"part: expected train or test, got {part!r}")
    for name, value in (("grids", grids), ("questions", questions)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if size < 2 or size % 2:
        raise ValueError(f"size: expected an even number, at least 2, got {size}")
    random = np.random.default_rng([seed, ("train", "test").index(part), 29])
    figures, described = _figures(part, size // 2, easy_vqa_folder, on_bad_image)
    scans, read = _scans(part, size // 2, held_out_digits, split_seed)
    images = np.full((grids, size, size, 3), 255, dtype=np.uint8)
    problems: list[Problem] = []
    for place in range(grids):
        if place < (grids + 1) // 2:
            chosen = random.choice(len(figures), 4, replace=False)
            cells = list(range(4))
            _fill(images[place], cells, figures[chosen])
            asked = _of_figures([described[index] for index in chosen], random)
        else:
            chosen = random.choice(len(scans), int(random.integers(2, 5)), replace=False)
            cells = sorted(random.permutation(4)[: len(chosen)].tolist())
            _fill(images[place], cells, scans[chosen])
            asked = _of_digits(cells, [read[index] for index in chosen])
        order = random.permutation(len(asked))[:questions]
        problems += [Problem(place, *asked[index]) for index in sorted(order.tolist())]
    return Chains(images, tuple(problems))


Asked = tuple[str, str, str, tuple[str, ...]]  # question, truth, kind, spelled


def _fill(grid: np.ndarray, cells: Sequence[int], parts: np.ndarray) -> None:
    side = grid.shape[0] // 2
    for cell, part in zip(cells, parts, strict=True):
        y, x = side * (cell // 2), side * (cell % 2)
        grid[y : y + side, x : x + side] = part


@lru_cache(maxsize=4)
def _figures(part: str, side: int, folder: str, on_bad_image: str) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """easy-vqa's images of which colour and shape are both known, and these."""
    split = easy_vqa(part, 64, folder=folder, on_bad_image=on_bad_image)
    known: dict[int, dict[str, str]] = {}
    for sample in split.samples:
        words = set(sample.question.strip("?").split())
        yes_no = sample.answer in ("yes", "no")
        negated = any(mark in sample.question for mark in _NEGATED)
        found = known.setdefault(sample.image, {})
        if not yes_no:
            found["shape" if sample.answer in _SHAPES else "colour"] = sample.answer
        for shape in _SHAPES if (sample.answer == "yes") != negated or not yes_no else ():
            if shape in words:
                found["shape"] = shape
    whole = {image: (found["colour"], found["shape"]) for image, found in known.items() if len(found) == 2}
    if len(whole) < 4:
        raise DataError(
            f"easy-vqa: expected at least 4 {part} images whose colour and shape are told, got {len(whole)}"
        )
    images = np.stack([to_square(Image.fromarray(split.images[image]), side) for image in whole])
    return images, list(whole.values())


def _scans(part: str, side: int, held_out: int, split_seed: int) -> tuple[np.ndarray, list[int]]:
    split = digits(side, held_out=held_out, split_seed=split_seed)[("train", "test").index(part)]
    if len(split.samples) < 4:
        raise DataError(f"digits: expected at least 4 {part} scans, got {len(split.samples)}")
    return split.images, [int(sample.answer) for sample in split.samples]


def _of_digits(cells: Sequence[int], values: Sequence[int]) -> list[Asked]:
    read = ", ".join(f"{PLACES[cell]} {value}" for cell, value in zip(cells, values, strict=True))
    total, steps = values[0], []
    for value in values[1:]:
        steps.append(f"{total} + {value} = {total + value}")
        total += value
    plus = " + ".join(map(str, values))
    largest, smallest = max(values), min(values)
    asked = [
        ("What is the sum of the digits?", str(total), "sum", _spelled(f"{read}. {', '.join(steps)}.", plus, total)),
        (
            "What is the largest digit minus the smallest?",
            str(largest - smallest),
            "difference",
            _spelled(
                f"{read}. Largest {largest}, smallest {smallest}. {largest} - {smallest} = {largest - smallest}.",
                f"{largest} - {smallest}",
                largest - smallest,
            ),
        ),
    ]
    if values.count(largest) == 1:
        where = PLACES[cells[values.index(largest)]]
        spelled = _spelled(f"{read}. Largest {largest}.", ", ".join(map(str, values)), where)
        asked.append(("Where is the largest digit?", where, "largest", spelled))
    return asked


def _of_figures(figures: Sequence[tuple[str, str]], random: np.random.Generator) -> list[Asked]:
    read = ", ".join(f"{place} {colour} {shape}" for place, (colour, shape) in zip(PLACES, figures, strict=True))
    colours, shapes = [colour for colour, _ in figures], [shape for _, shape in figures]
    asked: list[Asked] = []
    colour, shape = (str(random.choice(sorted(set(values)))) for values in (colours, shapes))
    hits = [place for place, figure in zip(PLACES, figures, strict=True) if colour == figure[0] or shape == figure[1]]
    asked.append(
        (
            f"How many shapes are {colour} or a {shape}?",
            str(len(hits)),
            "count",
            _spelled(f"{read}. {', '.join(hits)}: {len(hits)}.", ", ".join(hits), len(hits)),
        )
    )
    one, other = random.permutation(_SHAPES)[:2].tolist()
    counts = shapes.count(one), shapes.count(other)
    more = "neither" if counts[0] == counts[1] else f"{one if counts[0] > counts[1] else other}s"
    asked.append(
        (
            f"Which are there more of, {one}s or {other}s?",
            more,
            "compare",
            _spelled(f"{read}. {one}s {counts[0]}, {other}s {counts[1]}.", f"{counts[0]}, {counts[1]}", more),
        )
    )
    alone = [place for place, shape in zip(PLACES, shapes, strict=True) if shapes.count(shape) == 1]
    if alone:
        where = str(random.choice(alone))
        shape = shapes[PLACES.index(where)]
        asked.append(
            (f"Where is the only {shape}?", where, "locate", _spelled(f"{read}. Only {shape}: {where}.", shape, where))
        )
    return asked


def _spelled(steps: str, short: str, truth: object) -> tuple[str, ...]:
    return f"{steps} Answer: {truth}", f"{short}. Answer: {truth}", f"Answer: {truth}"

"""What an image is given: questions, their difficulties, and pixels, in proportion to its density."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m4ov.data.density.record import Density
from m4ov.data.shares import largest_remainder

#: Shares of easy, medium and hard questions of an image of density 0 and of density 1; between them, in proportion.
EMPTY_MIX, DENSE_MIX = (0.7, 0.25, 0.05), (0.2, 0.4, 0.4)


@dataclass(frozen=True)
class Allotment:
    """What one image is given.

    Attributes:
        questions: how many question-answer pairs.
        difficulties: of them, how many are easy, medium and hard.
        max_pixels: the most pixels that it is shown with.
    """

    questions: int
    difficulties: tuple[int, int, int]
    max_pixels: int

    def to_json(self) -> dict[str, Any]:
        easy, medium, hard = self.difficulties
        mix = {"easy": easy, "medium": medium, "hard": hard}
        return {"questions": self.questions, "difficulties": mix, "max_pixels": self.max_pixels}


def allot(
    densities: Sequence[Density],
    total: int,
    *,
    minimum: int = 1,
    maximum: int | None = None,
    power: float = 1.0,
    max_pixels: int = 1024 * 1024,
    min_pixels: int | None = None,
    pixel_unit: int = 32 * 32,
) -> list[Allotment]:
    """Divide ``total`` questions among images; the same for the same arguments.

    Args:
        densities: of the images.
        total: how many questions are given out, exactly.
        minimum, maximum: that an image gets. ``None``: no limit above.
        power: questions beyond the minimum go by ``combined ** power``, by largest remainder; 0 is uniform.
        max_pixels, min_pixels: the budget at density 1 and at density 0; ``None``: a sixteenth of ``max_pixels``.
            Between them it grows geometrically with the larger of ``combined`` and ``text``: reading needs resolution.
        pixel_unit: pixels of one visual token; budgets are multiples of it, rounded down, one at least.

    Returns:
        One for each image. Difficulties follow each image's density; what rounding leaves over goes on to the next
        image, so that the mix of the whole is that of the sum.

    Raises:
        ValueError: ``total`` is too small for the minima or too large for the maxima, or an argument is out of range.
    """
    count = len(densities)
    if minimum < 0 or (maximum is not None and maximum < minimum):
        raise ValueError(f"minimum and maximum must be 0 <= minimum <= maximum, got {minimum} and {maximum}")
    most = total if maximum is None else maximum
    if not minimum * count <= total <= most * count:
        limits = f"{minimum * count} to {'any number' if maximum is None and count else most * count}"
        raise ValueError(f"total must be {limits} for {count} images, got {total}")
    if not 0 <= power <= 16:
        raise ValueError(f"power must be 0 to 16, got {power}")
    fewest = max(1, max_pixels // 16) if min_pixels is None else min_pixels
    if not 1 <= fewest <= max_pixels or not 1 <= pixel_unit <= max_pixels:
        got = f"{min_pixels}, {max_pixels} and {pixel_unit}"
        raise ValueError(
            f"min_pixels and pixel_unit must be 1 to max_pixels; got min_pixels, max_pixels, pixel_unit {got}"
        )
    questions = _questions(densities, total, minimum, most, power)
    allotments = []
    owed = np.zeros(3)
    for density, number in zip(densities, questions, strict=True):
        mix = _mix(density.combined)
        owed += number * mix
        given = largest_remainder(np.maximum(owed, 0), number) if number else np.zeros(3, dtype=np.int64)
        owed -= given
        easy, medium, hard = given.tolist()
        wealth = max(density.combined, density.text)
        budget = fewest * (max_pixels / fewest) ** wealth
        # A hair more, so that the ends of the range are met in spite of rounding.
        tokens = max(1, int(budget * (1 + 1e-12) / pixel_unit))
        allotments.append(Allotment(number, (easy, medium, hard), tokens * pixel_unit))
    return allotments


def _questions(densities: Sequence[Density], total: int, minimum: int, most: int, power: float) -> list[int]:
    """By largest remainder; what is cut off at ``most`` is divided among the others."""
    weights = np.array([density.combined**power for density in densities])
    given = np.full(len(densities), minimum, dtype=np.int64)
    open_ = given < most
    while (left := total - int(given.sum())) > 0:
        share = np.zeros_like(given)
        share[open_] = largest_remainder(weights[open_], left)
        given = np.minimum(given + share, most)
        open_ = given < most
    return given.tolist()


def _mix(density: float) -> np.ndarray:
    return (1 - density) * np.array(EMPTY_MIX) + density * np.array(DENSE_MIX)

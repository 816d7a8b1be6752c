"""Where images and questions come from: data that installed packages carry, split as their authors split it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from m4ov.data.images import ImageError, read_image, stack, to_square

DIGIT_QUESTION = "Which digit is this?"
_SHAPES = ("circle", "rectangle", "triangle")


class DataError(ValueError):
    """A source is missing or not as it should be; the message names the file."""


class Sample(NamedTuple):
    """One question about one image. ``image``: its index in the split; ``kind``: the type of the question."""

    image: int
    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Split:
    """Part of a data set.

    Attributes:
        name: ``"general"`` or ``"domain"``.
        images: uint8 ``[N, size, size, 3]``.
        samples: grouped by image, in order.
        left_out: why images were left out, one line each.
    """

    name: str
    images: np.ndarray
    samples: tuple[Sample, ...]
    left_out: tuple[str, ...] = ()


def easy_vqa(split: str, size: int, *, folder: str = "", on_bad_image: str = "refuse") -> Split:
    """Questions on shapes and colours: easy-vqa 1.0 (MIT), 4,000 training and 1,000 test images.

    Args:
        split: ``"train"`` or ``"test"``.
        size: pixels a side of the images.
        folder: laid out as the package's ``data`` folder; empty: the installed package.
        on_bad_image: ``"refuse"`` raises at the first missing or truncated image, ``"skip"`` leaves it out with its
            questions.

    Raises:
        DataError: a file of questions is missing or malformed, or no image is left; or a bad image is refused.
    """
    root = (Path(folder) if folder else _package_folder("easy_vqa", "easy-vqa") / "data") / split
    questions = root / "questions.json"
    try:
        rows = json.loads(questions.read_text(encoding="utf-8"))
        rows = sorted((int(image), str(question), str(answer)) for question, answer, image in rows)
    except OSError as error:
        raise DataError(f"easy-vqa: {questions}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise DataError(f"easy-vqa: {questions}: not a list of [question, answer, image number] ({error})") from error
    images: list[np.ndarray] = []
    left_out: list[str] = []
    index: dict[int, int | None] = {}
    samples = []
    for number, question, answer in rows:
        if number not in index:
            try:
                image = read_image(root / "images" / f"{number}.png")
            except ImageError as error:
                if on_bad_image == "refuse":
                    raise DataError(f"{error}; data.on_bad_image=skip leaves such images out") from error
                index[number] = None
                left_out.append(str(error))
            else:
                index[number] = len(images)
                images.append(to_square(image, size))
        place = index[number]
        if place is not None:
            samples.append(Sample(place, question, answer, kind_of(question, answer)))
    if not samples:
        raise DataError(f"easy-vqa: {root}: no question is left")
    return Split("general", stack(images, size), tuple(samples), tuple(left_out))


def digits(size: int, *, held_out: int, split_seed: int) -> tuple[Split, Split]:
    """Scans of handwritten digits (scikit-learn's ``load_digits``: 1,797 real scans of 8 x 8, UCI ML), dark on white.

    Returns:
        The training and the held-out split. The split is random, fixed by ``split_seed``, with each digit's share
        of the held-out split equal to its share of the whole to within one scan.
    """
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    ink = np.rint(255 - scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(split_seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    # Evenly spaced picks from the scans sorted by digit.
    picked = np.zeros(len(labels), dtype=bool)
    picked[np.floor((np.arange(held_out) + 0.5) * len(labels) / held_out).astype(int)] = True
    splits = []
    for chosen in (np.sort(order[~picked]), np.sort(order[picked])):
        images = [to_square(Image.fromarray(ink[place]), size) for place in chosen]
        samples = (Sample(n, DIGIT_QUESTION, str(labels[place]), "digit") for n, place in enumerate(chosen))
        splits.append(Split("domain", stack(images, size), tuple(samples)))
    return splits[0], splits[1]


def _package_folder(module: str, distribution: str) -> Path:
    from importlib.util import find_spec

    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise DataError(f"the package {distribution} is not installed; pip install 'm4ov[quickstart]'")
    return Path(next(iter(found.submodule_search_locations)))


def kind_of(question: str, answer: str) -> str:
    """The type of a question about one shape of one colour, in whatever words."""
    if answer not in ("yes", "no"):
        return "shape" if answer in _SHAPES else "colour"
    what = "shape" if any(shape in question for shape in _SHAPES) else "colour"
    negated = " not " in question or question.startswith("is no ")
    return f"yes/no, {'not ' if negated else ''}this {what}"

"""Images with ground truth: real ones that installed packages carry, and files of your own.

What the truth of an image holds is said in :mod:`m4ov.data.teacher.templates`. Of easy-vqa and the digits only the
training splits are used (the digits' held-out scans as recipes draw them), so that a model that is trained on what
comes out can be judged on the rest.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from m4ov.data.images import ImageError, read_image, to_square
from m4ov.data.production.photos import CONTINENTS, PHOTOS
from m4ov.data.sources import DIGIT_QUESTION, DataError, digits
from m4ov.data.teacher.ranks import rank

SIDE = 64  # pixels of a single figure or digit
_CELL, _MARGIN = 32, 8  # pixels of a digit on a sheet, and between two
_FLAG_SCALE = 8  # of 16 x 11 pixels
_SHAPES = ("circle", "rectangle", "triangle")
_COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
_FIGURES = {
    "colour": {colour: [f"{colour} shape", f"{colour} shapes"] for colour in _COLOURS},
    "shape": {shape: [shape, f"{shape}s"] for shape in _SHAPES},
}
_DIGITS = {"digit": {str(digit): [str(digit), f"{digit}s"] for digit in range(10)}}
_DIGIT_TOPICS = {**dict.fromkeys("0689", "round"), **dict.fromkeys("147", "straight"), **dict.fromkeys("235", "curved")}
_SPLIT_SEED = 0  # as m4ov.recipe.DataConfig has it


class Item(NamedTuple):
    """An image and what is true of it; ``id`` is unique in its source."""

    id: str
    image: Image.Image
    truth: dict[str, Any]


class Source(NamedTuple):
    """A source of images: how many there are, a function that makes one of them, and the fields of
    :class:`m4ov.data_recipe.SourcesConfig` that both take."""

    size: Callable[..., int]
    make: Callable[..., Item]
    options: tuple[str, ...] = ()


# --- easy-vqa (MIT): one figure on a plain ground -------------------------------------------------------------------


@lru_cache(maxsize=1)
def _easy_vqa() -> tuple[Path, dict[int, list[list[str]]]]:
    root = _package("easy_vqa", "easy-vqa") / "data" / "train"
    try:
        rows = json.loads((root / "questions.json").read_text(encoding="utf-8"))
        of_image: dict[int, list[list[str]]] = {}
        for question, answer, number in rows:
            of_image.setdefault(int(number), []).append([str(question), str(answer)])
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"easy-vqa: {root / 'questions.json'}: cannot be read ({error})") from error
    return root / "images", dict(sorted(of_image.items()))


def _figure(number: int) -> tuple[str, str, list[list[str]]]:
    """(shape, colour, questions with kinds) of an image; a property that no question tells is empty."""
    shape = colour = ""
    asked = []
    for question, answer in _easy_vqa()[1][number]:
        words = set(question.strip("?").split())
        yes_no = answer in ("yes", "no")
        negated = yes_no and ("not" in words or "no" in words)
        there = not yes_no or (answer == "yes") != negated
        named = next((word for word in (*_SHAPES, *_COLOURS) if word in words), "")
        for value in (named if there else "", "" if yes_no else answer):
            shape, colour = (value if value in _SHAPES else shape), (value if value in _COLOURS else colour)
        kind = ("negation" if negated else "existence") if yes_no else "shape" if answer in _SHAPES else "colour"
        asked.append([f"{question[0].upper()}{question[1:]}", answer, kind])
    return shape, colour, asked


def _easy_vqa_item(index: int) -> Item:
    folder, of_image = _easy_vqa()
    number = list(of_image)[index]
    image = read_image(folder / f"{number}.png")
    shape, colour, asked = _figure(number)
    known = {"colour": colour, "shape": shape}
    attributes = {name: value for name, value in known.items() if value}
    label = " ".join(value for value in (colour, shape or "shape") if value)
    truth = {
        "topic": f"shapes.single.{shape}" if shape else "shapes.single.other",
        "size": list(image.size),
        "thing": "shape",
        "objects": [{"label": label, "box": _box(np.asarray(image)), "attributes": attributes}],
        "complete": True,
        "vocabulary": {name: _FIGURES[name] for name in attributes},
        "questions": asked,
    }
    return Item(f"{number:04d}", image, truth)


@lru_cache(maxsize=1)
def _whole_figures() -> list[int]:
    """Images whose shape and colour are both known, the last ones first, so that scenes repeat no single figure."""
    return [number for number in reversed(_easy_vqa()[1]) if all(_figure(number)[:2])]


def _scene_item(index: int) -> Item:
    """Four easy-vqa images as one of twice the side."""
    numbers = _whole_figures()[4 * index : 4 * index + 4]
    canvas = Image.new("RGB", (2 * SIDE, 2 * SIDE))
    objects = []
    for place, number in enumerate(numbers):
        image = read_image(_easy_vqa()[0] / f"{number}.png")
        dx, dy = SIDE * (place % 2), SIDE * (place // 2)
        canvas.paste(image, (dx, dy))
        x0, y0, x1, y1 = _box(np.asarray(image))
        shape, colour, _ = _figure(number)
        attributes = {"colour": colour, "shape": shape}
        objects.append(
            {"label": f"{colour} {shape}", "box": [x0 + dx, y0 + dy, x1 + dx, y1 + dy], "attributes": attributes}
        )
    truth = {
        "topic": "shapes.several.apart",
        "size": [2 * SIDE, 2 * SIDE],
        "thing": "shape",
        "objects": objects,
        "complete": True,
        "vocabulary": _FIGURES,
    }
    return Item("-".join(f"{number:04d}" for number in numbers), canvas, truth)


def _box(pixels: np.ndarray) -> list[int]:
    """Box of what is not ground, the most frequent colour of the edge. pixels: uint8 [H, W, 3]."""
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colours, counts = np.unique(edge, axis=0, return_counts=True)
    drawn = (pixels != colours[counts.argmax()]).any(axis=-1)
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    if not len(rows):
        return [0, 0, 0, 0]
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


# --- scikit-learn's scanned digits (UCI ML) --------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _scans(held_out: int) -> tuple[np.ndarray, list[str]]:
    try:
        split, _ = digits(8, held_out=held_out, split_seed=_SPLIT_SEED)
    except ImportError as error:
        raise DataError("digits need scikit-learn: pip install 'm4ov[data]'") from error
    return split.images, [sample.answer for sample in split.samples]


def _scan(index: int, side: int, held_out: int) -> Image.Image:
    return Image.fromarray(to_square(Image.fromarray(_scans(held_out)[0][index]), side))


def _digit_item(index: int, held_out_digits: int) -> Item:
    digit = _scans(held_out_digits)[1][index]
    truth = {
        "topic": f"scans.digits.{_DIGIT_TOPICS[digit]}",
        "size": [SIDE, SIDE],
        "thing": "digit",
        "objects": [{"label": "digit", "box": [0, 0, SIDE, SIDE], "attributes": {"digit": digit}}],
        "complete": True,
        "vocabulary": _DIGITS,
        "questions": [[DIGIT_QUESTION, digit, "digit"]],
    }
    return Item(f"{index:04d}", _scan(index, SIDE, held_out_digits), truth)


def _sheet_item(index: int, held_out_digits: int) -> Item:
    """Two to nine scans in rows; the last scans, so that sheets repeat no single digit."""
    rows, columns = 1 + rank("rows", index) % 3, 2 + rank("columns", index) % 2
    labels = _scans(held_out_digits)[1]
    pitch = _CELL + _MARGIN
    canvas = Image.new("RGB", (pitch * columns + _MARGIN, pitch * rows + _MARGIN), "white")
    objects = []
    for place in range(rows * columns):
        scan = len(labels) - 1 - 9 * index - place
        x, y = _MARGIN + pitch * (place % columns), _MARGIN + pitch * (place // columns)
        canvas.paste(_scan(scan, _CELL, held_out_digits), (x, y))
        attributes = {"digit": labels[scan]}
        objects.append({"label": labels[scan], "box": [x, y, x + _CELL, y + _CELL], "attributes": attributes})
    shown = [str(one["label"]) for one in objects]
    truth = {
        "topic": "scans.digits.numbers",
        "size": list(canvas.size),
        "thing": "digit",
        "objects": objects,
        "complete": True,
        "vocabulary": _DIGITS,
        "text": [" ".join(shown[row * columns : (row + 1) * columns]) for row in range(rows)],
    }
    return Item(f"{index:04d}", canvas, truth)


# --- django-countries (MIT): flags -----------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _flags() -> list[tuple[str, str, str, Path]]:
    """(code, three-letter code, country, file) of each flag that no other country has, by code."""
    root = _package("django_countries", "django-countries")
    names = {**_mapping(root / "data.py", "COUNTRIES"), **_mapping(root / "base.py", "COMMON_NAMES")}
    codes = _mapping(root / "data.py", "ALT_CODES")
    by_pixels: dict[bytes, list[str]] = {}
    for code in sorted(names):
        file = root / "static" / "flags" / f"{code.lower()}.gif"
        if file.is_file():
            by_pixels.setdefault(read_image(file).tobytes(), []).append(code)
    alone = sorted(sharing[0] for sharing in by_pixels.values() if len(sharing) == 1)
    folder = root / "static" / "flags"
    return [(code, str(codes[code][0]), str(names[code]), folder / f"{code.lower()}.gif") for code in alone]


def _mapping(file: Path, name: str) -> dict[str, Any]:
    """A dictionary of constants in a module that cannot be imported without Django; ``_("…")`` counts as "…"."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise DataError(f"django-countries: {file}: cannot be read ({error})") from error
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            found = getattr(node, "value", None)
            if isinstance(found, ast.Dict):
                values = [value.args[0] if isinstance(value, ast.Call) else value for value in found.values]
                keys = [ast.literal_eval(key) for key in found.keys if key is not None]
                return dict(zip(keys, map(ast.literal_eval, values), strict=True))
    raise DataError(f"django-countries: {file}: no dictionary {name} in it")


def _flag_item(index: int) -> Item:
    flags = _flags()
    # In an order of their own, so that the first few are not those of one corner of the alphabet.
    code, code3, country, file = sorted(flags, key=lambda flag: rank("flag", flag[0]))[index]
    others = sorted((flag[2] for flag in flags if flag[0] != code), key=lambda name: rank(code, name))[:3]
    flag = read_image(file)
    image = flag.resize((flag.width * _FLAG_SCALE, flag.height * _FLAG_SCALE), Image.Resampling.NEAREST)
    continents = (name for name, members in CONTINENTS.items() if code in members.split())
    truth = {
        "topic": f"world.flags.{next(continents, 'territories')}",
        "facts": {
            "country or territory that has this flag": {"value": country, "kind": "country", "choices": others},
            "two-letter ISO 3166 code of the country with this flag": {"value": code, "kind": "geography"},
            "three-letter ISO 3166 code of the country with this flag": {"value": code3, "kind": "geography"},
        },
        "questions": [["Is this a flag, a map or a photograph?", "a flag", "object"]],
    }
    return Item(code.lower(), image, truth)


# --- scikit-image's photos and scans ---------------------------------------------------------------------------------


def _photo_item(index: int) -> Item:
    name = list(PHOTOS)[index]
    image = read_image(_package("skimage", "scikit-image") / "data" / name)
    return Item(Path(name).stem, image, {"size": list(image.size), **PHOTOS[name]})


SOURCES: dict[str, Source] = {
    "easy_vqa": Source(lambda: len(_easy_vqa()[1]), _easy_vqa_item),
    "scenes": Source(lambda: len(_whole_figures()) // 4, _scene_item),
    "digits": Source(lambda held_out_digits: len(_scans(held_out_digits)[1]), _digit_item, ("held_out_digits",)),
    "sheets": Source(lambda held_out_digits: len(_scans(held_out_digits)[1]) // 9, _sheet_item, ("held_out_digits",)),
    "flags": Source(lambda: len(_flags()), _flag_item),
    "photos": Source(lambda: len(PHOTOS), _photo_item),
}


def items(name: str, start: int, stop: int, options: dict[str, Any]) -> Iterator[Item | ImageError]:
    """Images of a source; one that cannot be read has the error in its place.

    Args:
        options: what the source's ``options`` name.

    Raises:
        DataError: the package is missing, or not as it should be.
    """
    for index in islice(range(start, stop), SOURCES[name].size(**options)):
        try:
            yield SOURCES[name].make(index, **options)
        except ImageError as error:  # noqa: PERF203 - each image by itself
            yield error


def _package(module: str, distribution: str) -> Path:
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise DataError(f"the package {distribution} is not installed; pip install 'm4ov[data]'")
    return Path(next(iter(found.submodule_search_locations)))

"""The scorer that asks a teacher: the same four axes, told by a model that sees the image."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from m4ov.data.answers import AnswerError, parse_answer
from m4ov.data.density.metadata import read_metadata
from m4ov.data.density.pixels import as_rgb
from m4ov.data.density.record import AXES, Density, DensityError
from m4ov.data.teacher import Reply, Teacher, TeacherError

_KNOWN = 2000  # characters of metadata that a teacher is told
_SYSTEM = "You judge how much an image gives to ask about. Reply with one JSON object and nothing else."
_RUBRIC = """Score the image from 0 to 10 on each axis, and say in one sentence what you counted:
- subjects: how many things are shown and how different they are. 0: a blank ground; 5: a handful of different things; \
10: dozens of different kinds.
- spatial: in how many relations they stand (beside, above, inside, near, in front of). 0: at most one thing; \
5: several things in clear relations; 10: a dense arrangement.
- text: how much can be read. 0: nothing; 5: a few lines; 10: a full page.
- knowledge: how much one can ask that needs knowledge beyond the image. 0: nothing but forms and colours; \
5: a recognisable kind of place, species or object; 10: named things with many known facts.
Reply as {"subjects": {"score": 0, "evidence": "…"}, "spatial": {…}, "text": {…}, "knowledge": {…}}."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        axis: {
            "type": "object",
            "properties": {
                "score": {"type": "integer", "minimum": 0, "maximum": 10},
                "evidence": {"type": "string", "maxLength": 1000},
            },
            "required": ["score", "evidence"],
            "additionalProperties": False,
        }
        for axis in AXES
    },
    "required": list(AXES),
    "additionalProperties": False,
}


class Unscored(NamedTuple):
    """An image without a score. ``reason``: why; ``answer``: the start of what the teacher said, if it did."""

    name: str
    reason: str
    answer: str = ""


def score_by_teacher(
    images: Sequence[np.ndarray | Image.Image],
    teacher: Teacher,
    metadata: Sequence[Mapping[str, Any] | None] | None = None,
    *,
    names: Sequence[str] | None = None,
    max_side: int = 768,
    seed: int = 0,
) -> list[Density | Unscored]:
    """Densities told by a teacher, in the order of the images. Nothing stands in for a score that did not come.

    Args:
        images: as :func:`~m4ov.data.density.score` takes them; larger than ``max_side`` a side, they are scaled down.
        metadata: of each image, told to the teacher as JSON. ``None``: of none.
        names: of the images, for messages; ``None``: their places.
        seed: given to the teacher.

    Raises:
        ValueError: there is not one name and one metadata for each image.
    """
    names = [f"image {place}" for place in range(len(images))] if names is None else names
    metadata = [None] * len(images) if metadata is None else metadata
    if not len(images) == len(names) == len(metadata):
        counts = f"{len(images)} images, {len(names)} names, {len(metadata)} metadata"
        raise ValueError(f"score_by_teacher needs one name and one metadata for each image; got {counts}")
    asked = [_request(image, known, name, max_side) for image, known, name in zip(images, metadata, names, strict=True)]
    requests = [entry.messages for entry in asked if isinstance(entry, _Request)]
    answers = teacher.ask_many(requests, max_tokens=1024, seed=seed) if requests else []
    if len(answers) != len(requests):
        raise RuntimeError(f"teacher {teacher.name!r} gave {len(answers)} answers to {len(requests)} requests")
    next_answer = iter(answers)
    return [
        entry if isinstance(entry, Unscored) else _density(next(next_answer), entry.size, teacher.name, name)
        for entry, name in zip(asked, names, strict=True)
    ]


class _Request(NamedTuple):
    messages: list[dict[str, Any]]
    size: tuple[int, int]


def _request(
    image: np.ndarray | Image.Image, known: Mapping[str, Any] | None, name: str, max_side: int
) -> _Request | Unscored:
    try:
        rgb = as_rgb(image, name)
        read_metadata(known, rgb.size, f"{name}: metadata")
        told = json.dumps(known, ensure_ascii=False, default=str)[:_KNOWN] if known else ""
    except DensityError as error:
        return Unscored(name, str(error))
    except (TypeError, ValueError, RecursionError) as error:
        return Unscored(name, f"{name}: metadata: expected what JSON can hold ({error})")
    size = rgb.size
    if max(size) > max_side:
        rgb = rgb.copy()
        rgb.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    rgb.save(file, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    task = f"{_RUBRIC}\nKnown of the image: {told}" if told else _RUBRIC
    blocks = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": task}]
    return _Request([{"role": "system", "content": _SYSTEM}, {"role": "user", "content": blocks}], size)


def _density(answer: Reply | TeacherError, size: tuple[int, int], teacher: str, name: str) -> Density | Unscored:
    try:
        value = parse_answer(answer, SCHEMA)
    except AnswerError as error:
        return Unscored(name, str(error), answer.text[:2000] if isinstance(answer, Reply) else "")
    evidence = {axis: {"from": "teacher", "said": value[axis]["evidence"]} for axis in AXES}
    scores = {axis: value[axis]["score"] / 10 for axis in AXES}
    return Density.of(scores, {"scorer": teacher, "size": list(size), **evidence})

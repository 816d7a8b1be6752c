"""What is known of an image besides its pixels: world knowledge, objects with boxes, text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from m4ov.data.density.record import DensityError, saturated
from m4ov.data.density.structure import Subjects
from m4ov.data.records import short

KNOWLEDGE_SCALE = 4.0
WEIGHTS = {"facts": 1.0, "names": 1.0, "categories": 0.5}


class Known(NamedTuple):
    """``facts``, ``names``, ``categories``: how many different ones; ``subjects``: of ``objects``, if they are given;
    ``text``: lines."""

    facts: int
    names: int
    categories: int
    subjects: Subjects | None
    text: tuple[str, ...]


def read_metadata(metadata: Mapping[str, Any] | None, size: tuple[int, int], name: str = "metadata") -> Known:
    """Check and count metadata.

    Args:
        metadata: ``facts`` {name: value}, ``names`` and ``categories`` [str], ``text`` [str], ``objects``
            [{"label": str, "box": [left, top, right, bottom] in pixels}]. All may be missing; other names are ignored.
        size: width and height of the image.

    Raises:
        DensityError: a field is not of that form; names it.
    """
    if metadata is None:
        return Known(0, 0, 0, None, ())
    if not isinstance(metadata, Mapping):
        raise DensityError(f"{name}: expected an object, got {short(metadata)}")
    facts = metadata.get("facts") or {}
    if not isinstance(facts, Mapping) or not all(isinstance(fact, str) for fact in facts):
        raise DensityError(f"{name}.facts: expected names with values, got {short(facts)}")
    told = {fact.casefold() for fact, value in facts.items() if value is not None and str(value).strip()}
    lists = {field: _texts(metadata.get(field), f"{name}.{field}") for field in ("names", "categories", "text")}
    distinct = {field: len({text.casefold().strip() for text in lists[field]}) for field in ("names", "categories")}
    objects = metadata.get("objects")
    subjects = None if objects is None else _subjects(objects, size, f"{name}.objects")
    return Known(len(told), distinct["names"], distinct["categories"], subjects, lists["text"])


def knowledge_score(known: Known) -> float:
    amount = sum(weight * getattr(known, field) for field, weight in WEIGHTS.items())
    return saturated(amount, KNOWLEDGE_SCALE)


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise DensityError(f"{name}: expected a list of texts, got {short(value)}")
    return tuple(text for text in value if text.strip())


def _subjects(objects: Any, size: tuple[int, int], name: str) -> Subjects:
    if not isinstance(objects, list | tuple):
        raise DensityError(f"{name}: expected a list, got {short(objects)}")
    boxes = []
    labels = set()
    for place, entry in enumerate(objects):
        label, box = (entry.get("label"), entry.get("box")) if isinstance(entry, Mapping) else (None, None)
        if not isinstance(label, str) or not label.strip() or not _is_box(box):
            expected = 'expected {"label": text, "box": [left, top, right, bottom]}'
            raise DensityError(f"{name}[{place}]: {expected}, got {short(entry)}")
        labels.add(label.casefold().strip())
        boxes.append(box)
    scaled = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) / (*size, *size)
    areas = (scaled[:, 2] - scaled[:, 0]) * (scaled[:, 3] - scaled[:, 1])
    return Subjects(scaled[np.argsort(-areas, kind="stable")], len(labels))


def _is_box(box: Any) -> bool:
    if not isinstance(box, Sequence) or isinstance(box, str) or len(box) != 4:
        return False
    if not all(isinstance(edge, int | float) and not isinstance(edge, bool) and math.isfinite(edge) for edge in box):
        return False
    return bool(box[0] <= box[2] and box[1] <= box[3])

"""Files of records as splits: one image, questions about it, in memory, for small models of one image size."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from m4ov.data.images import ImageError, read_image, stack, to_square
from m4ov.data.records import Record, RecordError
from m4ov.data.shards import read_records
from m4ov.data.sources import DataError, Sample, Split


def recorded(name: str, path: str | Path, size: int) -> Split:
    """The records of a file or folder as a split: each one image, one question, one answer. Records of one image share
    it.

    Args:
        name: of the split.
        path: JSONL, Parquet or a folder of them (:func:`m4ov.data.shards.read_records`); images in it are relative.
        size: pixels a side that images are brought to.

    Raises:
        DataError: a record is none, or is not one image, one question and its answer; an image cannot be read; there is
            no record. Names the file, and where there is one the line or the record.
    """
    found = recorded_by(path, size, lambda record: Asked(name, record.question.strip(), record.kind or "record"))
    if not found:
        raise DataError(f"{path}: no record")
    return found[name]


class Asked(NamedTuple):
    """How a record is asked: in which split, in which words, as which kind of question."""

    split: str
    question: str
    kind: str


def recorded_by(path: str | Path, size: int, asked: Callable[[Record], Asked | None]) -> dict[str, Split]:
    """The records of a file or folder as splits, read once; see :func:`recorded`.

    Args:
        asked: says in which split a record is; ``None``: in none.

    Returns:
        Split by name, in the order in which their first records come.
    """
    images: dict[str, list[np.ndarray]] = {}
    index: dict[tuple[str, str], int] = {}
    of_image: dict[str, list[list[Sample]]] = {}
    try:
        for record in read_records(path, absolute=True):
            reference, found = _only_image(path, record), asked(record)
            if found is None:
                continue
            name = found.split
            if (name, reference) not in index:
                index[name, reference] = len(images.setdefault(name, []))
                images[name].append(to_square(_image(path, record, reference), size))
                of_image.setdefault(name, []).append([])
            place = index[name, reference]
            of_image[name][place].append(Sample(place, found.question, record.answer.strip(), found.kind))
    except RecordError as error:
        raise DataError(str(error)) from error
    return {
        name: Split(name, stack(found, size), tuple(sample for samples in of_image[name] for sample in samples))
        for name, found in images.items()
    }


def divide(split: Split, share: float) -> tuple[Split, Split]:
    """A split in two by images: about ``share`` of them, evenly spaced, and the others; each with its questions.

    Raises:
        DataError: one of the two would be empty.
    """
    places = np.arange(len(split.images))
    first = np.floor((places + 1) * share) > np.floor(places * share)
    parts = []
    for chosen in (first, ~first):
        kept = np.flatnonzero(chosen)
        new = {int(old): place for place, old in enumerate(kept)}
        samples = tuple(s._replace(image=new[s.image]) for s in split.samples if s.image in new)
        if not samples:
            raise DataError(f"{split.name}: {len(split.images)} images are too few to be divided at {share:g}")
        parts.append(Split(split.name, split.images[kept], samples))
    return parts[0], parts[1]


def _only_image(path: str | Path, record: Record) -> str:
    roles = [turn["role"] for turn in record.messages]
    if roles != ["user", "assistant"] or not record.question.strip():
        raise DataError(f"{path}: record {record.id}: expected a question and its answer, got turns of {roles}")
    if len(record.images) != 1:
        raise DataError(f"{path}: record {record.id}: expected one image, got {len(record.images)}")
    return record.images[0]


def _image(path: str | Path, record: Record, reference: str) -> Image.Image:
    try:
        if not reference.startswith("data:"):
            return read_image(Path(reference))
        _, _, encoded = reference.partition(",")
        with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as image:
            return image.convert("RGB")
    except ImageError as error:
        raise DataError(f"{path}: record {record.id}: {error}") from error
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: record {record.id}: its data: URI is no image ({error})") from error

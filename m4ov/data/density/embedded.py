"""The scorer that needs no network: pixels, metadata, and a text reader where one is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from m4ov.data.density.metadata import knowledge_score, read_metadata
from m4ov.data.density.pixels import as_rgb, copies
from m4ov.data.density.record import Density
from m4ov.data.density.structure import find_relations, find_subjects, spatial_score, subject_score
from m4ov.data.density.text import Reader, TextLine, of_lines, of_strokes


def score(
    image: np.ndarray | Image.Image,
    metadata: Mapping[str, Any] | None = None,
    ocr: Reader | None = None,
    *,
    name: str = "image",
) -> Density:
    """The information density of an image; the same for the same arguments.

    Args:
        image: uint8 ``[H, W, 3]``; also ``[H, W]``, ``[H, W, 1]``, ``[H, W, 4]`` (with opacity) or a PIL image.
        metadata: ``facts`` {name: value}, ``names``, ``categories`` and ``text`` [str], ``objects`` [{"label", "box":
            [left, top, right, bottom] in pixels}]; all may be missing. Objects or text count where they say more than
            the pixels do.
        ocr: reads the text (:func:`~m4ov.data.density.text.rapidocr`). ``None``: text is estimated from strokes.
        name: of the image, for messages.

    Raises:
        DensityError: the image or its metadata cannot be used; names which.
    """
    rgb = as_rgb(image, name)
    known = read_metadata(metadata, rgb.size, f"{name}: metadata")
    colour, grey, size = copies(rgb)
    found = {"pixels": find_subjects(colour)}
    if known.subjects is not None:
        found["metadata"] = known.subjects
    counts = {source: (len(subjects.boxes), subjects.kinds) for source, subjects in found.items()}
    relations = {source: find_relations(subjects.boxes) for source, subjects in found.items()}
    most_subjects = max(found, key=lambda source: subject_score(*counts[source]))
    most_related = max(found, key=lambda source: spatial_score(relations[source]))
    if ocr is None:
        text = of_strokes(grey)
    else:
        text = of_lines(ocr(np.asarray(rgb)), getattr(ocr, "__name__", type(ocr).__name__))
    if known.text:
        text = max(text, of_lines([TextLine(line, 1.0, 0.0) for line in known.text], "metadata"), key=lambda t: t.score)
    count, kinds = counts[most_subjects]
    pairs, cells = relations[most_related]
    knowledge = {"facts": known.facts, "names": known.names, "categories": known.categories}
    evidence = {
        "scorer": "embedded",
        "size": list(size),
        "subjects": {"from": most_subjects, "count": count, "kinds": kinds},
        "spatial": {"from": most_related, "pairs": pairs, "cells": cells},
        "text": text.evidence,
        "knowledge": {"from": "nothing" if metadata is None else "metadata", **knowledge},
    }
    axes = {
        "subjects": subject_score(count, kinds),
        "spatial": spatial_score(relations[most_related]),
        "text": text.score,
        "knowledge": knowledge_score(known),
    }
    return Density.of(axes, evidence)

"""How much there is to read: by text recognition, from text that is known, or from strokes that look like text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from m4ov.data.density.record import DensityError, saturated

CHARACTERS_SCALE, WORDS_SCALE, AREA_SCALE = 80.0, 20.0, 0.1
GLYPHS_SCALE = 60.0

_BLUR = 9  # radius in pixels of the local background
_CONTRAST = 28  # of 255: what differs so much from its background is ink, dark or light
_PARTED = 1.75  # how far a glyph's shades are from its paper's, at least
_HEIGHT = (5, 0.25)  # of a glyph: pixels at least, of the image at most
_NEIGHBOURS = 6  # nearest glyphs that are looked at


class TextLine(NamedTuple):
    """A line of text that was read. ``area``: of its box, as a share of the image; ``confidence`` in [0, 1]."""

    text: str
    confidence: float
    area: float


#: Reads an RGB image, uint8 ``[H, W, 3]``.
Reader = Callable[[np.ndarray], Sequence[TextLine]]


@lru_cache(maxsize=4)
def rapidocr(threads: int = 1) -> Reader:
    """The reader over the models inside ``rapidocr-onnxruntime`` (PP-OCRv4: detection, direction, recognition).

    Args:
        threads: of ONNX Runtime.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:
        raise ModuleNotFoundError(
            f"reading text needs rapidocr-onnxruntime; pip install 'm4ov[ocr]' ({error})"
        ) from None
    engine: Any = RapidOCR(intra_op_num_threads=threads, inter_op_num_threads=1)

    def read(image: np.ndarray) -> list[TextLine]:
        found, _ = engine(np.ascontiguousarray(image[:, :, ::-1]))  # it takes an array as BGR
        size = image.shape[0] * image.shape[1]
        return [TextLine(text, min(float(sure), 1.0), _area(box) / size) for box, text, sure in found or ()]

    read.__name__ = "rapidocr"  # as the evidence names it
    return read


def _area(corners: Sequence[Sequence[float]]) -> float:
    x, y = np.asarray(corners, dtype=np.float64).T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


class Text(NamedTuple):
    """``score`` in [0, 1], and what it was counted from."""

    score: float
    evidence: dict[str, Any]


def of_lines(lines: Iterable[TextLine], source: str) -> Text:
    """From text that was read or is known: how many characters, how many different words, how much area.

    Raises:
        DensityError: a line's confidence or area is not a number of at least 0.
    """
    characters = area = 0.0
    words: dict[str, float] = {}
    count = 0
    for line in lines:
        if not 0 <= line.confidence <= 1 or not 0 <= line.area < float("inf"):
            raise DensityError(f"text: expected a confidence in [0, 1] and an area of at least 0, got {line}")
        count += 1
        characters += line.confidence * sum(map(str.isalnum, line.text))
        area += line.confidence * line.area
        for word in line.text.casefold().split():
            if any(map(str.isalnum, word)):
                words[word] = max(words.get(word, 0.0), line.confidence)
    distinct = sum(words.values())
    score = (
        0.6 * saturated(characters, CHARACTERS_SCALE)
        + 0.2 * saturated(distinct, WORDS_SCALE)
        + 0.2 * saturated(area, AREA_SCALE)
    )
    counted = {"lines": count, "characters": round(characters, 3), "words": round(distinct, 3), "area": round(area, 6)}
    return Text(score, {"from": source, **counted})


def of_strokes(grey: Image.Image) -> Text:
    """Without reading: how many marks look like glyphs, thin, of a glyph's size, and in a row with others like them.

    It tells lines of print from texture and objects. It misses single characters, handwriting and low contrast, and
    may take fine regular ornament for text: an estimate, and the evidence says so.

    Args:
        grey: mode L, the working copy.
    """
    pixels = np.asarray(grey).astype(np.int64)
    difference = pixels - np.asarray(grey.filter(ImageFilter.BoxBlur(_BLUR)))
    sums = _integral(pixels), _integral(pixels**2)
    glyphs, area = 0, 0
    for ink in (difference < -_CONTRAST, difference > _CONTRAST):
        count, covered = _glyphs_in_rows(pixels, ink, sums)
        glyphs, area = glyphs + count, area + covered
    score = 0.8 * saturated(glyphs, GLYPHS_SCALE) + 0.2 * saturated(area / pixels.size, AREA_SCALE)
    return Text(score, {"from": "strokes", "glyphs": glyphs, "area": round(area / pixels.size, 6)})


def _glyphs_in_rows(pixels: np.ndarray, ink: np.ndarray, sums: tuple[np.ndarray, np.ndarray]) -> tuple[int, int]:
    """How many connected marks of ink ``[h, w]`` are like glyphs in a row, and the area of their boxes.

    ``sums``: integral images of ``pixels`` and of their squares.
    """
    from scipy import ndimage, spatial

    labels, count = ndimage.label(ink, np.ones((3, 3), dtype=bool))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    areas[0] = 0
    kept = np.flatnonzero((areas >= 6) & (areas <= ink.size // 50))
    if len(kept) < 3:
        return 0, 0
    place = np.zeros(count + 1, dtype=np.int32)
    place[kept] = np.arange(1, len(kept) + 1)
    labels = place[labels]
    found = ndimage.find_objects(labels)
    box = np.array([(y.start, y.stop, x.start, x.stop) for y, x in found]).T  # [4, N]
    height, width, area = box[1] - box[0], box[3] - box[2], areas[kept]
    # Pixels with ink on all four sides: what is left is the outline, about twice a stroke's length.
    inner = ink[1:-1, 1:-1] & ink[:-2, 1:-1] & ink[2:, 1:-1] & ink[1:-1, :-2] & ink[1:-1, 2:]
    outline = area - np.bincount(labels[1:-1, 1:-1][inner], minlength=len(kept) + 1)[1:]
    thickness = area / outline  # half a stroke's width
    fill = area / (height * width)
    like = (height >= _HEIGHT[0]) & (height <= max(_HEIGHT[0], _HEIGHT[1] * ink.shape[0])) & (width <= 8 * height)
    like &= (thickness <= 0.22 * np.maximum(height, width)) & (fill >= 0.12) & (fill <= 0.9)
    like &= _parted(pixels, labels, box, area, sums) >= _PARTED
    if like.sum() < 3:
        return 0, 0
    height, width, thickness = height[like], width[like], thickness[like]
    x, y = (box[2] + box[3])[like] / 2, (box[0] + box[1])[like] / 2
    # Rows lie across: what is above or below is three times as far.
    tree = spatial.cKDTree(np.stack([x, 3 * y], axis=1))
    _, near = tree.query(tree.data, k=list(range(2, min(_NEIGHBOURS, len(x) - 1) + 2)))
    taller = np.maximum(height[:, None], height[near])
    gap = np.abs(x[:, None] - x[near]) - (width[:, None] + width[near]) / 2
    alike = (np.abs(y[:, None] - y[near]) < 0.5 * taller) & (gap < 1.2 * taller) & (gap > -0.3 * taller)
    alike &= (taller < 2 * np.minimum(height[:, None], height[near])) & (
        np.maximum(thickness[:, None], thickness[near]) < 1.8 * np.minimum(thickness[:, None], thickness[near])
    )
    in_row = alike.sum(axis=1) >= 2
    return int(in_row.sum()), int((height * width)[in_row].sum())


def _parted(
    pixels: np.ndarray, labels: np.ndarray, box: np.ndarray, area: np.ndarray, sums: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """How far each mark's pixels are from the others in its box: the difference of their means over the sum of their
    standard deviations. Print on paper has 2 to 3; texture, which has all shades between, has 1 to 1.7."""
    top, bottom, left, right = np.maximum(box - [[1], [0], [1], [0]], 0)
    bottom, right = np.minimum(bottom + 1, pixels.shape[0]), np.minimum(right + 1, pixels.shape[1])
    around = (bottom - top) * (right - left) - area
    inside = np.flatnonzero(labels)
    of_pixel, values = labels.ravel()[inside], pixels.ravel()[inside].astype(np.float64)
    means, spreads = [], []
    inks = [np.bincount(of_pixel, values**power)[1:] for power in (1, 2)]
    boxes = [whole[bottom, right] - whole[top, right] - whole[bottom, left] + whole[top, left] for whole in sums]
    papers = [whole - ink for whole, ink in zip(boxes, inks, strict=True)]
    for (total, squares), number in ((inks, area), (papers, np.maximum(around, 1))):
        means.append(total / number)
        spreads.append(np.sqrt(np.maximum(squares / number - means[-1] ** 2, 0)))
    parted = np.abs(means[0] - means[1]) / (spreads[0] + spreads[1] + 1)
    return np.where(around > 0, parted, 0)


def _integral(values: np.ndarray) -> np.ndarray:
    """int64 ``[h + 1, w + 1]``: sums over all that is above and to the left."""
    whole = np.zeros((values.shape[0] + 1, values.shape[1] + 1), dtype=np.int64)
    np.cumsum(values, axis=0, out=whole[1:, 1:])
    np.cumsum(whole[1:, 1:], axis=1, out=whole[1:, 1:])
    return whole

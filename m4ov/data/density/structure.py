"""Subjects and spatial relations: from regions of the image, or from boxes that somebody gave."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from m4ov.data.density.record import saturated

EDGE = 14  # of 255: a step between neighbouring pixels that parts two regions
TEXTURE = (13, 0.75)  # a square of so many pixels a side is texture if more than this share of it is edges
MARK = (5, 0.4)  # pixels a side, and share of its box, that edges have which are a mark
MIN_AREA = 0.001  # of the image: smaller regions are not counted
RELATED = 12  # the largest subjects, whose relations are counted
NEAR = 0.1  # of the image's side: a smaller gap between two boxes is "near"
_GREY_CHROMA, _LIGHTNESS = 40, (85, 170)

SUBJECTS_SCALE, KINDS_SCALE, RELATIONS_SCALE = 8.0, 4.0, 40.0


class Subjects(NamedTuple):
    """``boxes``: float64 ``[N, 4]`` (left, top, right, bottom) in [0, 1], the largest first; ``kinds``: how many differ
    in colour or form."""

    boxes: np.ndarray
    kinds: int


def find_subjects(colour: np.ndarray) -> Subjects:
    """Regions of an image, without the largest, which is the ground.

    A region is a connected set of pixels without edges between them; or a connected texture, where edges are so dense
    that no region is left between them; or a mark, a compact set of edges around nothing that is counted: a thing too
    small to have an inside.

    Args:
        colour: uint8 ``[h, w, 3]``, the working copy.
    """
    from scipy import ndimage

    values = colour.astype(np.int16)
    height, width = values.shape[:2]
    edge = np.zeros((height, width), dtype=bool)
    across = np.abs(values[:, 1:] - values[:, :-1]).max(axis=2) > EDGE
    down = np.abs(values[1:] - values[:-1]).max(axis=2) > EDGE
    # Both sides of a step: so a mirrored image has mirrored edges.
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    side, share = TEXTURE
    texture = ndimage.uniform_filter(edge.astype(np.float32), side, mode="nearest") > share
    edge &= ~texture
    labels, flat = ndimage.label(~(edge | texture))
    textures, textured = ndimage.label(texture)
    edges, edged = ndimage.label(edge, np.ones((3, 3), dtype=bool))
    regions = flat + textured
    labels = np.where(texture, textures + flat, np.where(edge, edges + regions, labels))
    areas = np.bincount(labels.ravel(), minlength=regions + edged + 1)
    kept = np.flatnonzero(areas >= max(4, MIN_AREA * height * width))
    kept = kept[np.argsort(-areas[kept], kind="stable")]
    kept = np.delete(kept, np.flatnonzero(kept <= regions)[:1])
    if not len(kept):
        return Subjects(np.zeros((0, 4)), 0)
    place = np.zeros(regions + edged + 1, dtype=np.int32)
    place[kept] = np.arange(1, len(kept) + 1)
    labels = place[labels]
    found = ndimage.find_objects(labels)
    boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in found], dtype=np.float64)
    sides = boxes[:, 2:] - boxes[:, :2]
    fill = areas[kept] / sides.prod(axis=1)
    mark = kept > regions
    around = np.all(boxes[:, None, :2] <= boxes[:, :2], axis=2) & np.all(boxes[:, None, 2:] >= boxes[:, 2:], axis=2)
    small = (sides.min(axis=1) >= MARK[0]) & (fill >= MARK[1]) & ~np.any(around[:, ~mark], axis=1)
    chosen = ~mark | small
    inside = np.flatnonzero(labels)
    of_pixel = labels.ravel()[inside]
    sums = [np.bincount(of_pixel, channel[inside], len(kept) + 1)[1:] for channel in values.reshape(-1, 3).T]
    means = np.stack(sums, axis=1) / areas[kept, None]
    forms = np.digitize(fill, (0.4, 0.65, 0.88))  # thin or bent, triangle-like, round, box
    kinds = len(np.unique((_colour_names(means) * 4 + forms)[chosen]))
    return Subjects(boxes[chosen] / (width, height, width, height), kinds)


def _colour_names(means: np.ndarray) -> np.ndarray:
    """Of mean colours ``[N, 3]``: black, grey or white (0 to 2), or one of six hues around the primaries (3 to 8)."""
    top, bottom = means.max(axis=1), means.min(axis=1)
    chroma = np.maximum(top - bottom, 1e-9)
    red, green, blue = means.T
    hue = np.select(
        [top == red, top == green], [(green - blue) / chroma % 6, (blue - red) / chroma + 2], (red - green) / chroma + 4
    )
    return np.where(
        top - bottom < _GREY_CHROMA, np.digitize(means.mean(axis=1), _LIGHTNESS), 3 + np.rint(hue).astype(int) % 6
    )


def subject_score(count: int, kinds: int) -> float:
    """Half for how many, half for how many kinds."""
    return (saturated(count, SUBJECTS_SCALE) + saturated(kinds, KINDS_SCALE)) / 2


class Relations(NamedTuple):
    """``pairs``: relations between two subjects; ``cells``: of a 3 x 3 grid, those where a subject has its centre."""

    pairs: int
    cells: int


def find_relations(boxes: np.ndarray) -> Relations:
    """Relations among the largest subjects: beside, above, within, near.

    Args:
        boxes: float64 ``[N, 4]`` (left, top, right, bottom) in [0, 1], the largest first.
    """
    if not len(boxes):
        return Relations(0, 0)
    left, top, right, bottom = boxes[:RELATED].T[:, :, None]
    other = boxes[:RELATED].T[:, None, :]
    beside = right <= other[0]
    above = bottom <= other[1]
    within = (left >= other[0]) & (top >= other[1]) & (right <= other[2]) & (bottom <= other[3])
    for relation in (beside, above, within):  # a box without width is beside itself
        np.fill_diagonal(relation, False)
    gap = np.maximum(
        np.maximum(left - other[2], other[0] - right), np.maximum(top - other[3], other[1] - bottom)
    )  # negative where boxes overlap
    near = np.triu((gap < NEAR) & ~within & ~within.T, 1)
    pairs = int(beside.sum() + above.sum() + within.sum() + near.sum())
    centres = np.clip((boxes[:, :2] + boxes[:, 2:]) / 2 * 3, 0, 2.999).astype(int)
    return Relations(pairs, len(np.unique(centres @ (1, 3))))


def spatial_score(found: Relations) -> float:
    return saturated(found.pairs + found.cells, RELATIONS_SCALE)

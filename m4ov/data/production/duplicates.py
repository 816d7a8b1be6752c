"""Images and questions that are the same, or nearly."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from PIL import Image

_BITS = 64
_PERMUTATIONS = 128
_GRAM = 4
_FEW = 64  # texts, of which each is compared with each


def hashes(image: Image.Image) -> dict[str, str]:
    """Hashes of an RGB image by which equal and similar ones are found: ``pixels`` (SHA-256 of size and pixels),
    ``shape`` (64 bits: signs of its low frequencies) and ``colour`` (42 bits: shares of hues), as ImageHash has them.
    """
    try:
        import imagehash
    except ImportError as error:
        raise ImportError("finding duplicates needs ImageHash: pip install 'm4ov[data]'") from error
    digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    return {"pixels": digest, "shape": str(imagehash.phash(image)), "colour": str(imagehash.colorhash(image))}


def similar_images(hashed: Sequence[dict[str, str]], bits: int) -> list[int]:
    """Which images are near duplicates.

    Two are if their ``shape`` differs in at most ``bits`` bits, and so does their ``colour``; and whoever is one of the
    other's is one of theirs. All pairs are found: of ``bits + 1`` parts of two such hashes, at least one is equal.

    Returns:
        For each image the index of the first of its group.
    """
    groups = _Groups(len(hashed))
    codes = [(int(one["shape"], 16), int(one["colour"], 16)) for one in hashed]
    edges = [part * _BITS // (bits + 1) for part in range(bits + 2)]
    for low, high in pairwise(edges):
        buckets: dict[int, list[int]] = {}
        for place, (shape, _) in enumerate(codes):
            buckets.setdefault((shape >> low) & ((1 << (high - low)) - 1), []).append(place)
        for members in buckets.values():
            # Equal hashes are one candidate, so that a thousand copies are not half a million pairs.
            first: dict[tuple[int, int], int] = {}
            for place in members:
                groups.join(first.setdefault(codes[place], place), place)
            distinct = list(first.values())
            for number, one in enumerate(distinct):
                for other in distinct[number + 1 :]:
                    if all(_apart(a, b) <= bits for a, b in zip(codes[one], codes[other], strict=True)):
                        groups.join(one, other)
    return [groups.first(place) for place in range(len(hashed))]


def _apart(one: int, other: int) -> int:
    return bin(one ^ other).count("1")


class _Groups:
    """Disjoint sets; the first member stands for its set."""

    def __init__(self, size: int) -> None:
        self._above = list(range(size))

    def first(self, place: int) -> int:
        while self._above[place] != place:
            self._above[place] = self._above[self._above[place]]
            place = self._above[place]
        return place

    def join(self, one: int, other: int) -> None:
        a, b = sorted((self.first(one), self.first(other)))
        self._above[b] = a


def near_texts(texts: Sequence[str], threshold: float) -> list[int | None]:
    """For each text the index of an earlier one that is nearly the same, if there is one.

    Judged by the Jaccard similarity of the two sets of character 4-grams. Of many texts, candidates come from MinHash
    and locality-sensitive hashing (datasketch), which overlooks few. A text that repeats another is no candidate for
    later ones.
    """
    candidates = _Earlier() if len(texts) <= _FEW else _Sketches(threshold)
    found: list[int | None] = []
    grams = [_grams(text) for text in texts]
    for place, own in enumerate(grams):
        near = next((other for other in candidates.of(own) if _jaccard(own, grams[other]) >= threshold), None)
        found.append(near)
        if near is None:
            candidates.add(place, own)
    return found


class _Earlier:
    """All earlier texts are candidates."""

    def __init__(self) -> None:
        self._places: list[int] = []

    def of(self, grams: frozenset[str]) -> list[int]:
        return self._places

    def add(self, place: int, grams: frozenset[str]) -> None:
        self._places.append(place)


class _Sketches(_Earlier):
    """Earlier texts whose sketches agree in a band."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        datasketch = _datasketch()
        # The library looks for bands by integrals, each time anew, unless it is told.
        self._index = datasketch.MinHashLSH(num_perm=_PERMUTATIONS, params=_bands(threshold))
        self._new = datasketch.MinHash

    def _sketch(self, grams: frozenset[str]) -> Any:
        sketch = self._new(num_perm=_PERMUTATIONS, seed=1)
        sketch.update_batch([gram.encode() for gram in sorted(grams)])
        return sketch

    def of(self, grams: frozenset[str]) -> list[int]:
        return sorted(self._index.query(self._sketch(grams)))

    def add(self, place: int, grams: frozenset[str]) -> None:
        self._index.insert(place, self._sketch(grams))


@lru_cache(maxsize=4)
def _bands(threshold: float) -> tuple[int, int]:
    index = _datasketch().MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, weights=(0.1, 0.9))
    return index.b, index.r


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError as error:
        raise ImportError("finding duplicates needs datasketch: pip install 'm4ov[data]'") from error
    return datasketch


def _grams(text: str) -> frozenset[str]:
    text = f" {text} "
    return frozenset(text[place : place + _GRAM] for place in range(max(1, len(text) - _GRAM + 1)))


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


def normalised(text: str) -> str:
    """A question or an answer as equal ones are told by it: case, punctuation at the ends and articles are nothing."""
    words = (word.strip("\"'“”‘’.,;:!?()[]") for word in text.casefold().split())
    kept = [word for word in words if word and word not in ("a", "an", "the")]
    return " ".join(kept) or text.casefold().strip()


def same_answer(one: str, other: str) -> bool:
    """Whether two answers say the same: equal when normalised, or equal numbers."""
    a, b = normalised(one), normalised(other)
    if a == b:
        return True
    try:
        return float(a.replace(",", "")) == float(b.replace(",", ""))
    except ValueError:
        return False

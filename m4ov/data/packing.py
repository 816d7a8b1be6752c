"""Samples as Qwen3-VL reads them, and many samples in one row that do not see each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from m4ov.data.images import ImageGeometry
from m4ov.data.tokenizer import IMAGE, TURN_END, completion, prompt, token_id

IGNORE = -100


@dataclass(frozen=True)
class Encoded:
    """One sample, int64 arrays of length L.

    Attributes:
        input_ids: the question, the answer and its end token.
        labels: ``input_ids`` at the answer and its end token, -100 elsewhere; not shifted.
        types: 1 at image tokens, 0 at text.
        positions: ``[4, L]``: the text position, then M-RoPE's time, height and width.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    types: np.ndarray
    positions: np.ndarray


def mrope_positions(types: np.ndarray, grid_thw: Sequence[tuple[int, int, int]], merge_size: int) -> np.ndarray:
    """Positions of one sample in time, height and width, as Qwen3-VL counts them.

    Text advances all three. An image starts where the text before it ends, counts its rows and columns of merged
    patches from there, and the text after it goes on behind the larger of both.

    Args:
        types: ``[L]``, 1 at image tokens, 0 at text.
        grid_thw: patches of each image in time, height and width, in order.
        merge_size: patches a side of one token.

    Returns:
        int64 ``[3, L]``.

    Raises:
        ValueError: the image tokens are not as many as the grids say.
    """
    types = np.asarray(types)
    bounds = np.flatnonzero(np.diff(types)) + 1
    positions = np.empty((3, len(types)), dtype=np.int64)
    grids = iter(grid_thw)
    here = 0
    for start, end in zip([0, *bounds], [*bounds, len(types)], strict=True):
        if start == end:
            continue
        if types[start] == 0:
            positions[:, start:end] = here + np.arange(end - start)
            here += end - start
            continue
        frames, height, width = next(grids, (0, 0, 0))
        height, width = height // merge_size, width // merge_size
        if frames * height * width != end - start:
            raise ValueError(f"{end - start} image tokens for an image of {frames} x {height} x {width} merged patches")
        positions[:, start:end] = here + np.indices((frames, height, width)).reshape(3, -1)
        here += max(height, width)
    if next(grids, None) is not None:
        raise ValueError("more images than runs of image tokens")
    return positions


class Encoder:
    """Encodes questions about one image each; remembers what it encoded, because questions repeat."""

    def __init__(self, tokenizer: Tokenizer, geometry: ImageGeometry) -> None:
        self.tokenizer, self.geometry = tokenizer, geometry
        self.image_token, self.end_token = token_id(tokenizer, IMAGE), token_id(tokenizer, TURN_END)
        self._known: dict[tuple[str, str], Encoded] = {}

    def __call__(self, question: str, answer: str) -> Encoded:
        key = (question, answer)
        if key not in self._known:
            self._known[key] = self._encode(question, answer)
        return self._known[key]

    def _encode(self, question: str, answer: str) -> Encoded:
        asked = self.tokenizer.encode(prompt(question, self.geometry.tokens)).ids
        answered = self.tokenizer.encode(completion(answer)).ids
        input_ids = np.asarray(asked + answered, dtype=np.int64)
        labels = np.asarray([IGNORE] * len(asked) + answered, dtype=np.int64)
        types = (input_ids == self.image_token).astype(np.int64)
        spatial = mrope_positions(types, [self.geometry.grid_thw], self.geometry.merge_size)
        return Encoded(input_ids, labels, types, np.concatenate([np.arange(len(input_ids))[None], spatial]))


@dataclass(frozen=True)
class PackedBatch:
    """Samples one after the other in one row of T tokens; images may serve several samples.

    Attributes:
        input_ids, labels, mm_token_type_ids: int64 ``[1, T]``; labels are not shifted.
        position_ids: int64 ``[4, 1, T]``: text positions, restarting at 0 with each sample (this is what keeps samples
            apart), and M-RoPE positions of each sample for itself.
        lengths: tokens of each sample.
        pixel_values: ``[N * patches, C * t * p * p]``, each image once.
        image_grid_thw: int64 ``[N, 3]``.
        image_of_sample: int64 ``[S]``, which image a sample asks about.
        num_labels: tokens that count in the loss.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    mm_token_type_ids: Tensor
    lengths: tuple[int, ...]
    pixel_values: Tensor
    image_grid_thw: Tensor
    image_of_sample: Tensor
    num_labels: int

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]


def pack(
    samples: Sequence[Encoded],
    image_of_sample: Sequence[int] | np.ndarray,
    pixel_values: np.ndarray,
    geometry: ImageGeometry,
    dtype: torch.dtype = torch.float32,
) -> PackedBatch:
    """One row of several samples.

    Args:
        samples: at least one, each with one image.
        image_of_sample: for each sample, the index of its image in ``pixel_values``.
        pixel_values: float32 ``[N * patches, …]``, from :func:`m4ov.data.images.patchify`.
        dtype: of the batch's ``pixel_values``.

    Raises:
        ValueError: no sample, or an index without an image.
    """
    images = len(pixel_values) // geometry.patches
    owner = np.asarray(image_of_sample, dtype=np.int64)
    if not len(samples) or owner.shape != (len(samples),):
        raise ValueError(f"pack needs samples and one image for each; got {len(samples)} samples, {len(owner)} images")
    if owner.min() < 0 or owner.max() >= images:
        raise ValueError(f"image_of_sample must lie in 0 to {images - 1}; got {owner.min()} to {owner.max()}")

    def row(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(sample, name) for sample in samples], axis=-1))

    labels = row("labels")
    return PackedBatch(
        input_ids=row("input_ids")[None],
        labels=labels[None],
        position_ids=row("positions")[:, None],
        mm_token_type_ids=row("types")[None],
        lengths=tuple(len(sample.input_ids) for sample in samples),
        pixel_values=torch.from_numpy(pixel_values).to(dtype),
        image_grid_thw=torch.tensor([geometry.grid_thw] * images, dtype=torch.int64),
        image_of_sample=torch.from_numpy(owner),
        num_labels=int((labels != IGNORE).sum()),
    )

"""The images, or the videos, of a batch: patches, grids, and where their features go."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Patches:
    """One image or video as a vision tower reads it. Samples that hold the same object share it: a batch has it once.

    Attributes:
        pixel_values: ``[t · h · w, C · T · P · P]``, floating.
        grid_thw: patches in time, height and width.
        second_per_grid: seconds between the frames of a video of Qwen2.5-VL.
    """

    pixel_values: Tensor
    grid_thw: Grid
    second_per_grid: float | None = None

    @staticmethod
    def split(pixel_values: Tensor, grid_thw: Tensor | Sequence[Sequence[int]]) -> list[Patches]:
        """What a processor returns for several images, image by image: views of ``pixel_values``.

        Raises:
            ValueError: the grids are not of as many patches as there are.
        """
        rows = grid_thw.tolist() if isinstance(grid_thw, Tensor) else [list(row) for row in grid_thw]
        grids = [(int(t), int(h), int(w)) for t, h, w in rows]
        sizes = [math.prod(grid) for grid in grids]
        if sum(sizes) != pixel_values.shape[0]:
            raise ValueError(f"Patches: grid_thw must be of {pixel_values.shape[0]} patches; got {sum(sizes)}")
        return [Patches(part, grid) for part, grid in zip(pixel_values.split(sizes), grids, strict=True)]


@dataclass(frozen=True, eq=False)
class VisionInputs:
    """The images (or videos) of a packed batch of N samples.

    Attributes:
        pixel_values: ``[P, C · T · P · P]``, each image once, one after the other.
        grid_thw: int64 ``[n, 3]``.
        positions: int64 ``[V]``, the tokens of the batch that take features, ascending.
        features: int64 ``[V]``, which row of the merged features each takes: ``0, 1, …`` unless images are shared.
        second_per_grid_ts: float32 ``[n]``, or ``None``.
        grids: ``grid_thw``, on the host.
        shown: of each sample, which images it shows, in the order of its tokens.
        merge_size: patches a side of one feature.
    """

    pixel_values: Tensor
    grid_thw: Tensor
    positions: Tensor
    features: Tensor
    second_per_grid_ts: Tensor | None
    grids: tuple[Grid, ...]
    shown: tuple[tuple[int, ...], ...]
    merge_size: int

    @property
    def shared(self) -> bool:
        """Whether an image stands in more than one place, or not in the order of the tokens."""
        return [image for images in self.shown for image in images] != list(range(len(self.grids)))

    def tokens(self, image: int) -> int:
        return math.prod(self.grids[image]) // self.merge_size**2

    def select(self, samples: Sequence[int], old: Sequence[int], new: Sequence[int]) -> VisionInputs | None:
        """Those of some samples. ``old``, ``new``: the first token of every old and of every new sample."""
        kept = list(dict.fromkeys(image for sample in samples for image in self.shown[sample]))
        if not kept:
            return None
        place = {image: index for index, image in enumerate(kept)}
        counts = [sum(map(self.tokens, images)) for images in self.shown]
        begins = [0, *accumulate(counts)]
        positions = [
            self.positions[begins[sample] : begins[sample + 1]] + (begin - old[sample])
            for sample, begin in zip(samples, new, strict=True)
        ]
        patches = [0, *accumulate(math.prod(grid) for grid in self.grids)]
        pixels = torch.cat([self.pixel_values[patches[image] : patches[image + 1]] for image in kept])
        rows = torch.tensor(kept).to(self.grid_thw.device)
        seconds = self.second_per_grid_ts
        made = replace(
            self,
            pixel_values=pixels,
            grid_thw=self.grid_thw[rows],
            positions=torch.cat(positions),
            second_per_grid_ts=None if seconds is None else seconds[rows],
            grids=tuple(self.grids[image] for image in kept),
            shown=tuple(tuple(place[image] for image in self.shown[sample]) for sample in samples),
        )
        return replace(made, features=made.rows().to(self.features.device))

    def rows(self) -> Tensor:
        """``features``, from ``shown``."""
        begins = [0, *accumulate(map(self.tokens, range(len(self.grids))))]
        return torch.cat([torch.arange(begins[image], begins[image + 1]) for images in self.shown for image in images])

    def apply(self, function: Callable[[Tensor], Tensor], pixels: Callable[[Tensor], Tensor]) -> VisionInputs:
        """Every tensor by ``function``; ``pixel_values`` by ``pixels``."""
        seconds = self.second_per_grid_ts
        return replace(
            self,
            pixel_values=pixels(self.pixel_values),
            grid_thw=function(self.grid_thw),
            positions=function(self.positions),
            features=function(self.features),
            second_per_grid_ts=None if seconds is None else function(seconds),
        )


def collect(
    patches: Sequence[Sequence[Patches]], positions: Tensor, merge_size: int, dtype: torch.dtype | None
) -> VisionInputs | None:
    """The patches of every sample as one; each object once. ``positions``: of their tokens."""
    unique = list({id(item): item for items in patches for item in items}.values())
    if not unique:
        return None
    place = {id(item): index for index, item in enumerate(unique)}
    grids = tuple(item.grid_thw for item in unique)
    pixels = torch.cat([item.pixel_values for item in unique])
    timed = [item.second_per_grid for item in unique if item.second_per_grid is not None]
    made = VisionInputs(
        pixel_values=pixels if dtype is None else pixels.to(dtype),
        grid_thw=torch.tensor(grids, dtype=torch.int64),
        positions=positions,
        features=positions,
        second_per_grid_ts=torch.tensor(timed) if timed else None,
        grids=grids,
        shown=tuple(tuple(place[id(item)] for item in items) for items in patches),
        merge_size=merge_size,
    )
    return replace(made, features=made.rows())


def concatenate(parts: Sequence[tuple[VisionInputs | None, int, int]]) -> VisionInputs | None:
    """One after the other: (part, its samples, its first token). Images are not shared between parts."""
    present = [(part, begin) for part, _, begin in parts if part is not None]
    if not present:
        return None
    sizes = {part.merge_size for part, _ in present}
    if len(sizes) > 1:
        raise ValueError(f"PackedBatch: batches must be of one merge_size; got {sorted(sizes)}")
    if len({part.second_per_grid_ts is None for part, _ in present}) > 1:
        raise ValueError("PackedBatch: second_per_grid must be known of all videos or of none; got both")
    shown: list[tuple[int, ...]] = []
    grids: list[Grid] = []
    features, rows = [], 0
    for part, samples, _ in parts:
        if part is None:
            shown += [()] * samples
            continue
        shown += [tuple(image + len(grids) for image in images) for images in part.shown]
        grids += part.grids
        features.append(part.features + rows)
        rows += sum(map(part.tokens, range(len(part.grids))))
    seconds = [part.second_per_grid_ts for part, _ in present if part.second_per_grid_ts is not None]
    return VisionInputs(
        pixel_values=torch.cat([part.pixel_values for part, _ in present]),
        grid_thw=torch.cat([part.grid_thw for part, _ in present]),
        positions=torch.cat([part.positions + begin for part, begin in present]),
        features=torch.cat(features),
        second_per_grid_ts=torch.cat(seconds) if seconds else None,
        grids=tuple(grids),
        shown=tuple(shown),
        merge_size=sizes.pop(),
    )

"""Training batches of the two data sets. A step is a function of (seed, step) alone, so a run can go on anywhere."""

from __future__ import annotations

from functools import lru_cache
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from m4ov.data.images import mirror, patchify, shift
from m4ov.data.packing import Encoded, Encoder
from m4ov.data.sources import Sample, Split
from m4ov_kernels.packing import PackedBatch

# How readily a group of questions is asked, by (about the shape, yes/no). easy-vqa asks for shapes half as often as for
# colours; but colours are learnt in a few hundred steps, and shapes, above all yes/no questions about them, take time:
# asked equally often, these stayed at the prior (69%) for 900 steps; so, they reach 99%.
_WEIGHTS = {(False, False): 1.0, (True, False): 2.0, (False, True): 2.0, (True, True): 3.0}


class Mixture:
    """Some shape images with several questions each, and some digits, in every step.

    Images come in a new random order every epoch; which of an image's questions are asked, and how images are moved
    and mirrored, is drawn anew each time. Questions fall into four groups, about the shape or the colour, yes/no or
    not; ``_WEIGHTS`` says how readily each is asked, as far as an image has them.

    Args:
        general, domain: the training splits.
        encoder: makes token ids of questions.
        seed: of the whole run.
        images, questions, digits: per step: shape images, questions of each (fewer if it has fewer), digits.
        flip: mirror half of the shape images.
        shift: move digits by up to so many pixels.
        dtype: of ``pixel_values``.
        rank, ranks: whose share of a step :meth:`batches` makes.
        accumulate: in how many parts it makes it.

    Raises:
        ValueError: a step has fewer images than there are shares of it.
    """

    def __init__(
        self,
        general: Split,
        domain: Split,
        encoder: Encoder,
        *,
        seed: int,
        images: int,
        questions: int,
        digits: int,
        flip: bool,
        shift: int,
        dtype: torch.dtype,
        rank: int = 0,
        ranks: int = 1,
        accumulate: int = 1,
    ) -> None:
        if images + digits < ranks * accumulate:
            raise ValueError(
                f"a step has {images} + {digits} images (data.images_per_step, data.digits_per_step), which is fewer "
                f"than {ranks} ranks x {accumulate} parts (train.accumulate)"
            )
        self.rank, self.ranks, self.accumulate = rank, ranks, accumulate
        self.general, self.domain, self.encoder = general, domain, encoder
        self.seed, self.images, self.questions, self.digits = seed, images, questions, digits
        self.flip, self.shift, self.dtype = flip, shift, dtype
        self._of_image: list[list[Sample]] = [[] for _ in general.images]
        for sample in general.samples:
            self._of_image[sample.image].append(sample)
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def batches(self, step: int) -> list[PackedBatch]:
        """This rank's share of one step, part by part."""
        shares = self.ranks * self.accumulate
        return [self.batch(step, self.rank + part * self.ranks, shares) for part in range(self.accumulate)]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the step is all that a step depends on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to go on from."""

    def batch(self, step: int, share: int = 0, shares: int = 1) -> PackedBatch:
        """The batch of one step, or every ``shares``-th image of it with its questions.

        All is drawn for the whole step, so that a sample is the same in whatever share it comes.
        """
        random = np.random.default_rng([self.seed, 0, step])
        shapes = self._visited(0, len(self.general.images), step, self.images)
        scans = self._visited(1, len(self.domain.images), step, self.digits)
        questions: list[list[Encoded]] = []  # of each image
        for image in shapes:
            asked = self._asked(self._of_image[image], random)
            questions.append([self.encoder(sample.question, sample.answer) for sample in asked])
        for image in scans:
            scan = self.domain.samples[image]
            questions.append([self.encoder(scan.question, scan.answer)])
        mirrored = random.random(len(shapes)) < 0.5 if self.flip else np.zeros(len(shapes), dtype=bool)
        moved = random.integers(-self.shift, self.shift + 1, (len(scans), 2)) if self.shift else None
        ours, scanned = slice(share, None, shares), slice((share - len(shapes)) % shares, None, shares)
        shape_pixels = mirror(self.general.images[shapes[ours]], mirrored[ours])
        digit_pixels = self.domain.images[scans[scanned]]
        if moved is not None:
            digit_pixels = shift(digit_pixels, moved[scanned])
        pixel_values = patchify(np.concatenate([shape_pixels, digit_pixels]), self.encoder.geometry)
        kept = questions[share::shares]
        owners = [place for place, asked in enumerate(kept) for _ in asked]
        return self.encoder.pack([sample for asked in kept for sample in asked], owners, pixel_values, self.dtype)

    def _asked(self, known: list[Sample], random: np.random.Generator) -> list[Sample]:
        """Some of an image's questions: one of each group in turn, groups with more weight likely to come first."""
        groups: dict[tuple[bool, bool], list[Sample]] = {}
        for place in random.permutation(len(known)):
            kind = known[place].kind
            groups.setdefault((kind.endswith("shape"), kind.startswith("yes/no")), []).append(known[place])
        waiting = {group: random.exponential() / _WEIGHTS[group] for group in sorted(groups)}
        turns = zip_longest(*(groups[group] for group in sorted(waiting, key=waiting.__getitem__)))
        return [sample for turn in turns for sample in turn if sample is not None][: self.questions]

    def _visited(self, stream: int, size: int, step: int, count: int) -> np.ndarray:
        """Indices ``[count]`` of the images of one step: the next ones in an endless row of shuffled epochs."""
        places = np.arange(step * count, (step + 1) * count)
        epochs = places // size
        if count == 0 or epochs[0] == epochs[-1]:
            return self._order(stream, size, int(places[0] // size) if count else 0)[places % size]
        return np.array(
            [self._order(stream, size, int(epoch))[place % size] for epoch, place in zip(epochs, places, strict=True)]
        )

    def _shuffled(self, stream: int, size: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 1 + stream, epoch]).permutation(size)

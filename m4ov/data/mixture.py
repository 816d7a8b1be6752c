"""Training batches of the two data sets. A batch is a function of (seed, step) alone, so a run can go on anywhere."""

from __future__ import annotations

from functools import lru_cache
from itertools import zip_longest

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
    ) -> None:
        self.general, self.domain, self.encoder = general, domain, encoder
        self.seed, self.images, self.questions, self.digits = seed, images, questions, digits
        self.flip, self.shift, self.dtype = flip, shift, dtype
        self._of_image: list[list[Sample]] = [[] for _ in general.images]
        for sample in general.samples:
            self._of_image[sample.image].append(sample)
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def batch(self, step: int) -> PackedBatch:
        """The batch of one step."""
        random = np.random.default_rng([self.seed, 0, step])
        shapes = self._visited(0, len(self.general.images), step, self.images)
        scans = self._visited(1, len(self.domain.images), step, self.digits)
        samples: list[Encoded] = []
        owners: list[int] = []
        for place, image in enumerate(shapes):
            asked = self._asked(self._of_image[image], random)
            samples += [self.encoder(sample.question, sample.answer) for sample in asked]
            owners += [place] * len(asked)
        for place, image in enumerate(scans):
            scan = self.domain.samples[image]
            samples.append(self.encoder(scan.question, scan.answer))
            owners.append(len(shapes) + place)
        shape_pixels, digit_pixels = self.general.images[shapes], self.domain.images[scans]
        if self.flip:
            shape_pixels = mirror(shape_pixels, random.random(len(shapes)) < 0.5)
        if self.shift:
            digit_pixels = shift(digit_pixels, random.integers(-self.shift, self.shift + 1, (len(scans), 2)))
        pixel_values = patchify(np.concatenate([shape_pixels, digit_pixels]), self.encoder.geometry)
        return self.encoder.pack(samples, owners, pixel_values, self.dtype)

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

"""Training batches of several pools of samples. A step is a function of (seed, step, state) alone, so a run can go on
anywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
_SIDES = re.compile(r"\b(left|right)\b")


@dataclass(frozen=True)
class Pool:
    """Samples that are drawn together.

    Attributes:
        name: of the pool.
        split: its images and questions.
        questions: asked of an image at a visit, at most.
        flip: mirror half of the images left to right; never one that is asked about its left or right.
        shift: move images by up to so many pixels.
        by_sample: a visit is one question with its image, so that an image is seen as often as it has questions; else
            a visit is an image, with ``questions`` of those it has.
    """

    name: str
    split: Split
    questions: int = 1
    flip: bool = False
    shift: int = 0
    by_sample: bool = False

    def visits(self) -> list[tuple[int, list[Sample]]]:
        """What an epoch consists of: images, each with the questions of which some are asked."""
        if self.by_sample:
            return [(sample.image, [sample]) for sample in self.split.samples]
        of_image: list[list[Sample]] = [[] for _ in self.split.images]
        for sample in self.split.samples:
            of_image[sample.image].append(sample)
        return list(enumerate(of_image))


class Mixture:
    """Every step has so many visits of each pool.

    Each pool's images come in a new random order every epoch; which of an image's questions are asked, and how images
    are moved and mirrored, is drawn anew each time. Questions fall into four groups, about the shape or the colour,
    yes/no or not; ``_WEIGHTS`` says how readily each is asked, as far as an image has them.

    The pools, their order, ``seed`` and the numbers of visits say everything about a step. The numbers may change
    between steps (:meth:`change`); what came before is then part of the state.

    Args:
        pools: at least one, of different names.
        counts: visits of each pool a step.
        encoder: makes token ids of questions.
        seed: of the whole run.
        dtype: of ``pixel_values``.
        rank, ranks: whose share of a step :meth:`batches` makes.
        accumulate: in how many parts it makes it.

    Raises:
        ValueError: a step has fewer images than there are shares of it; a pool is empty; counts and pools do not fit.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        counts: Mapping[str, int],
        encoder: Encoder,
        *,
        seed: int,
        dtype: torch.dtype,
        rank: int = 0,
        ranks: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.pools, self.encoder, self.seed, self.dtype = tuple(pools), encoder, seed, dtype
        self.rank, self.ranks, self.accumulate = rank, ranks, accumulate
        self._visits = [pool.visits() for pool in self.pools]
        # Whether anything is to be drawn about which questions are asked.
        self._chosen = [any(len(known) > 1 for _, known in visits) for visits in self._visits]
        for pool, visits in zip(self.pools, self._visits, strict=True):
            if not visits:
                raise ValueError(f"pool {pool.name}: expected samples, got none")
        self._order = lru_cache(maxsize=2 * len(self.pools))(self._shuffled)
        # Since when the counts are as they are, and how many visits of each pool there were before.
        self._since, self._before, self._changed = 0, [0] * len(self.pools), False
        self.counts = self._checked(counts)

    def change(self, step: int, counts: Mapping[str, int]) -> None:
        """Other numbers of visits from ``step`` on, a step that has not come yet; orders go on where they are.

        Raises:
            ValueError: see the class.
        """
        checked = self._checked(counts)
        self._before = self._begins(step)
        self._since, self.counts, self._changed = step, checked, True

    def batches(self, step: int) -> list[PackedBatch]:
        """This rank's share of one step, part by part."""
        shares = self.ranks * self.accumulate
        return [self.batch(step, self.rank + part * self.ranks, shares) for part in range(self.accumulate)]

    def state_dict(self) -> dict[str, Any]:
        """What was changed; nothing, if nothing was."""
        if not self._changed:
            return {}
        names = [pool.name for pool in self.pools]
        before = dict(zip(names, self._before, strict=True))
        return {"since": self._since, "before": before, "counts": dict(zip(names, self.counts, strict=True))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        if state:
            self._since, self._changed = state["since"], True
            self._before = [state["before"][pool.name] for pool in self.pools]
            self.counts = self._checked(state["counts"])

    def batch(self, step: int, share: int = 0, shares: int = 1) -> PackedBatch:
        """The batch of one step, or every ``shares``-th image of it with its questions.

        All is drawn for the whole step, so that a sample is the same in whatever share it comes.
        """
        random = np.random.default_rng([self.seed, 0, step])
        visited = [
            self._visited(stream, len(self._visits[stream]), begin, count)
            for stream, (begin, count) in enumerate(zip(self._begins(step), self.counts, strict=True))
        ]
        questions: list[list[Encoded]] = []  # of each visit
        sided: list[bool] = []
        for pool, visits, chosen, places in zip(self.pools, self._visits, self._chosen, visited, strict=True):
            for place in places:
                known = visits[place][1]
                asked = self._asked(known, pool.questions, random) if chosen else known
                questions.append([self.encoder(sample.question, sample.answer) for sample in asked])
                sided.append(pool.flip and any(_SIDES.search(sample.question) for sample in asked))
        pixels, offset = [], 0
        for pool, visits, places in zip(self.pools, self._visits, visited, strict=True):
            ours = slice((share - offset) % shares, None, shares)
            images = pool.split.images[[visits[place][0] for place in places[ours]]]
            if pool.flip:
                flipped = (random.random(len(places)) < 0.5) & ~np.array(sided[offset : offset + len(places)], bool)
                images = mirror(images, flipped[ours])
            if pool.shift:
                images = shift(images, random.integers(-pool.shift, pool.shift + 1, (len(places), 2))[ours])
            pixels.append(images)
            offset += len(places)
        pixel_values = patchify(np.concatenate(pixels), self.encoder.geometry)
        kept = questions[share::shares]
        owners = [place for place, asked in enumerate(kept) for _ in asked]
        return self.encoder.pack([sample for asked in kept for sample in asked], owners, pixel_values, self.dtype)

    def _checked(self, counts: Mapping[str, int]) -> list[int]:
        names = [pool.name for pool in self.pools]
        if sorted(counts) != sorted(names) or min(counts.values(), default=0) < 0:
            raise ValueError(f"counts: expected visits of each of {', '.join(names)}; got {dict(counts)}")
        if sum(counts.values()) < self.ranks * self.accumulate:
            of = " + ".join(str(counts[name]) for name in names)
            raise ValueError(
                f"a step has {of} images (of {', '.join(names)}), which is fewer than {self.ranks} ranks x "
                f"{self.accumulate} parts (train.accumulate)"
            )
        return [counts[name] for name in names]

    def _begins(self, step: int) -> list[int]:
        """The place in each pool's endless row of epochs at which a step begins."""
        passed = step - self._since
        return [before + passed * count for before, count in zip(self._before, self.counts, strict=True)]

    def _asked(self, known: list[Sample], questions: int, random: np.random.Generator) -> list[Sample]:
        """Some of an image's questions: one of each group in turn, groups with more weight likely to come first."""
        groups: dict[tuple[bool, bool], list[Sample]] = {}
        for place in random.permutation(len(known)):
            kind = known[place].kind
            groups.setdefault((kind.endswith("shape"), kind.startswith("yes/no")), []).append(known[place])
        waiting = {group: random.exponential() / _WEIGHTS[group] for group in sorted(groups)}
        turns = zip_longest(*(groups[group] for group in sorted(waiting, key=waiting.__getitem__)))
        return [sample for turn in turns for sample in turn if sample is not None][:questions]

    def _visited(self, stream: int, size: int, begin: int, count: int) -> np.ndarray:
        """Indices ``[count]`` of the visits of one step: the next ones in an endless row of shuffled epochs."""
        places = np.arange(begin, begin + count)
        epochs = places // size
        if count == 0 or epochs[0] == epochs[-1]:
            return self._order(stream, size, int(places[0] // size) if count else 0)[places % size]
        return np.array(
            [self._order(stream, size, int(epoch))[place % size] for epoch, place in zip(epochs, places, strict=True)]
        )

    def _shuffled(self, stream: int, size: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 1 + stream, epoch]).permutation(size)

"""Rows of bounded length from an endless shuffled stream of samples: the same on any number of ranks, and resumable."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np

from m4ov_kernels.packing import pack_sequences

B = TypeVar("B")
#: One visit of a sample: ``(epoch, index)``. Whatever is random about it follows from these two and the seed.
Visit = tuple[int, int]


class NoUsableSampleError(ValueError):
    """No sample of a whole epoch can be used."""


class LazyLengths(ABC):
    """Tokens of samples that are asked for when a sample is first visited, and then again: always the same answer."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples, usable or not."""

    @abstractmethod
    def __getitem__(self, index: int) -> int:
        """From 1 to the capacity; 0: the sample cannot be used and is passed over."""


class PackedLoader(Generic[B]):
    """Packs samples into rows of at most ``capacity`` tokens, ``rows`` of them a step, over all ranks.

    Every rank plans every step, from lengths alone, and makes the rows that are its own: every ``ranks``-th. So what a
    step holds depends on the seed alone, and the state is small, the same on all ranks, and fits any number of them.

    Samples come in a new random order every epoch. Those that wait are packed best-fit; the fullest rows go into the
    step, and always the row with the sample that waits longest, so that none waits for ever. The others wait on.

    Args:
        lengths: tokens of each sample, each from 1 to ``capacity``; or :class:`LazyLengths`, on all ranks alike.
        make: the batch of one row, of the visits in it.
        capacity: tokens of a row.
        rows: of a step, of all ranks; a multiple of ``ranks``. A rank has ``rows / ranks`` batches a step.
        seed: of the order.
        window: tokens that wait, at least, when a step is packed, in multiples of what a step holds: more fills rows
            better.
        order: of the samples in an epoch, indices ``[N]``, of that epoch's random numbers; ``None``: any permutation.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        lengths: Sequence[int] | LazyLengths,
        make: Callable[[Sequence[Visit]], B],
        *,
        capacity: int,
        rows: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        window: float = 2.0,
        order: Callable[[np.random.Generator], np.ndarray] | None = None,
    ) -> None:
        self.lengths = lengths if isinstance(lengths, LazyLengths) else [int(length) for length in lengths]
        known = [] if isinstance(self.lengths, LazyLengths) else self.lengths
        wrong = [place for place, length in enumerate(known) if not 0 < length <= capacity]
        if wrong or not len(self.lengths):
            found = f"lengths[{wrong[0]}] = {self.lengths[wrong[0]]}" if wrong else "no sample"
            raise ValueError(f"PackedLoader: lengths: expected samples of 1 to {capacity} tokens; got {found}")
        if rows < 1 or rows % ranks:
            near = [count for count in (rows // ranks * ranks, (rows // ranks + 1) * ranks) if count > 0]
            raise ValueError(f"PackedLoader: rows: expected a multiple of {ranks} ranks, such as {near}; got {rows}")
        if window < 1:
            raise ValueError(f"PackedLoader: window: expected 1 or greater; got {window}")
        self.make, self.capacity, self.rows, self.seed, self.window = make, capacity, rows, seed, window
        self.rank, self.ranks = rank, ranks
        self.step, self.read = 0, 0  # steps that were made; visits that were taken from the stream
        self.waiting: list[Visit] = []  # the longest wait first
        self._shuffle = order or (lambda random: random.permutation(len(self.lengths)))
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def batches(self, step: int) -> list[B]:
        """This rank's rows of the next step.

        Raises:
            ValueError: ``step`` is not the next.
            NoUsableSampleError: with :class:`LazyLengths`.
        """
        if step != self.step:
            raise ValueError(f"PackedLoader: step: expected {self.step}, the next; got {step}")
        planned = self._plan()
        self.step += 1
        return [self.make(row) for row in planned[self.rank :: self.ranks]]

    def state_dict(self) -> dict[str, Any]:
        """Steps, place in the stream, and the samples that wait to be packed."""
        return {"step": self.step, "read": self.read, "waiting": [list(visit) for visit in self.waiting]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, on any number of ranks."""
        self.step, self.read = state["step"], state["read"]
        self.waiting = [(epoch, index) for epoch, index in state["waiting"]]

    def _plan(self) -> list[list[Visit]]:
        """The rows of one step, of all ranks."""
        tokens, unusable = sum(self.lengths[index] for _, index in self.waiting), 0
        while tokens < self.window * self.rows * self.capacity:  # so there are at least as many rows
            epoch, place = divmod(self.read, len(self.lengths))
            index = int(self._order(epoch)[place])
            length = self.lengths[index]
            if length:
                self.waiting.append((epoch, index))
            unusable = 0 if length else unusable + 1
            if unusable > len(self.lengths):
                raise NoUsableSampleError(f"PackedLoader: lengths: none of the {len(self.lengths)} samples can be used")
            tokens += length
            self.read += 1
        lengths = [self.lengths[index] for _, index in self.waiting]
        bins = [found.tolist() for found in pack_sequences(lengths, self.capacity)]
        # Of equally full rows the one that waits longer; the one with the oldest sample before all.
        fill = [sum(lengths[place] for place in found) for found in bins]
        order = sorted(range(len(bins)), key=lambda row: (min(bins[row]) != 0, -fill[row], min(bins[row])))
        chosen = [sorted(bins[row]) for row in order[: self.rows]]
        taken = {place for row in chosen for place in row}
        planned = [[self.waiting[place] for place in row] for row in chosen]
        self.waiting = [visit for place, visit in enumerate(self.waiting) if place not in taken]
        return planned

    def _shuffled(self, epoch: int) -> np.ndarray:
        return self._shuffle(np.random.default_rng([self.seed, epoch]))

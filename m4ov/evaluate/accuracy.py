"""Exact-match accuracy on held-out questions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from m4ov.data import Encoder, Sample, Split, patchify
from m4ov.data.packing import IGNORE
from m4ov.models.qwen3_vl import forward
from m4ov_kernels.packing import PackedBatch


@dataclass(frozen=True)
class Accuracy:
    """How many answers were right.

    Attributes:
        split: its name.
        kinds: type of question → (right, asked).
        right: for each question, in the split's order.
        said: what the model said, for each question; see :func:`exact_match`.
    """

    split: str
    kinds: dict[str, tuple[int, int]]
    right: tuple[bool, ...]
    said: tuple[str, ...]

    @property
    def value(self) -> float:
        """Share of right answers, in 0 to 1."""
        return sum(self.right) / len(self.right)


@torch.no_grad()
def exact_match(
    model: torch.nn.Module,
    split: Split,
    encoder: Encoder,
    *,
    questions_per_batch: int,
    limit: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Accuracy:
    """Ask every question and compare the whole answer, its end token included.

    An answer counts if greedy decoding would give exactly it. That is so if and only if, with the true answer fed in,
    the most likely token is the true one at every place up to and with the end token: one forward for all places
    instead of one for each. Where a token differs, greedy decoding differs from the true answer there, and ``said``
    holds the most likely tokens up to the end token (behind the first wrong one, the true answer was still fed in).

    Args:
        limit: ask only so many questions, spread evenly over the split; 0: all.
        dtype: of ``pixel_values``.
    """
    model.eval()
    samples = split.samples
    if limit and limit < len(samples):
        samples = tuple(samples[place * len(samples) // limit] for place in range(limit))
    right: list[bool] = []
    said: list[str] = []
    for batch in _batches(split, samples, encoder, questions_per_batch, dtype):
        labels = batch.labels[1:]
        where = (labels != IGNORE).nonzero()[:, 0]
        logits = forward(model, batch, with_labels=False).logits[0]
        best = logits.index_select(0, where).argmax(dim=-1)
        owner = torch.repeat_interleave(torch.tensor(batch.lengths))[where + 1]
        wrong = torch.zeros(len(batch.lengths), dtype=torch.int64).index_add_(0, owner, (best != labels[where]).long())
        right += (wrong == 0).tolist()
        said += [_text(encoder, best[owner == place].tolist()) for place in range(len(batch.lengths))]
    kinds: dict[str, tuple[int, int]] = {}
    for sample, ok in zip(samples, right, strict=True):
        hits, asked = kinds.get(sample.kind, (0, 0))
        kinds[sample.kind] = (hits + ok, asked + 1)
    return Accuracy(split.name, dict(sorted(kinds.items())), tuple(right), tuple(said))


def _batches(
    split: Split, samples: tuple[Sample, ...], encoder: Encoder, size: int, dtype: torch.dtype
) -> Iterator[PackedBatch]:
    for start in range(0, len(samples), size):
        asked = samples[start : start + size]
        images, owner = np.unique([sample.image for sample in asked], return_inverse=True)
        pixels = patchify(split.images[images], encoder.geometry)
        yield encoder.pack([encoder(s.question, s.answer) for s in asked], owner, pixels, dtype)


def _text(encoder: Encoder, tokens: list[int]) -> str:
    end = encoder.end_token
    return encoder.tokenizer.decode(tokens[: tokens.index(end)] if end in tokens else tokens).strip()

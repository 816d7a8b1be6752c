"""Exact-match accuracy on held-out questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from m4ov.data import Encoder, Sample, Split, patchify
from m4ov.data.packing import IGNORE
from m4ov.models.qwen3_vl import Qwen3VL, forward
from m4ov_kernels.packing import PackedBatch, pack_sequences


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
    tokens_per_batch: int,
    limit: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Accuracy:
    """Ask every question and compare the whole answer, its end token included.

    An answer counts if greedy decoding would give exactly it. That is so if and only if, with the true answer fed in,
    the most likely token is the true one at every place up to and with the end token: one forward for all places
    instead of one for each. Where a token differs, greedy decoding differs from the true answer there, and ``said``
    holds the most likely tokens up to the end token (behind the first wrong one, the true answer was still fed in).

    Args:
        model: this package's, or transformers' class.
        tokens_per_batch: capacity of a packed row. All questions about an image go into one row, so that the vision
            tower sees it once, unless they alone need more; no result depends on it.
        limit: ask only so many questions, spread evenly over the split; 0: all.
        dtype: of ``pixel_values``.
    """
    model.eval()
    samples = split.samples
    if limit and limit < len(samples):
        samples = tuple(samples[place * len(samples) // limit] for place in range(limit))
    right = [False] * len(samples)
    said = [""] * len(samples)
    for places, batch in _batches(split, samples, encoder, tokens_per_batch, dtype):
        labels = batch.labels[1:]
        where = (labels != IGNORE).nonzero()[:, 0]
        best = _most_likely(model, batch, where)
        owner = torch.repeat_interleave(torch.tensor(batch.lengths))[where + 1]
        wrong = torch.zeros(len(batch.lengths), dtype=torch.int64).index_add_(0, owner, (best != labels[where]).long())
        for row, place in enumerate(places):
            right[place] = bool(wrong[row] == 0)
            said[place] = _text(encoder, best[owner == row].tolist())
    kinds: dict[str, tuple[int, int]] = {}
    for sample, ok in zip(samples, right, strict=True):
        hits, asked = kinds.get(sample.kind, (0, 0))
        kinds[sample.kind] = (hits + ok, asked + 1)
    return Accuracy(split.name, dict(sorted(kinds.items())), tuple(right), tuple(said))


def accuracies(
    model: torch.nn.Module,
    splits: Mapping[str, Split],
    encoder: Encoder,
    *,
    tokens_per_batch: int,
    limit: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Accuracy]:
    """:func:`exact_match` on each of the splits, by their skills."""
    return {
        skill: exact_match(model, split, encoder, tokens_per_batch=tokens_per_batch, limit=limit, dtype=dtype)
        for skill, split in splits.items()
    }


def shares(
    model: torch.nn.Module,
    splits: Mapping[str, Split],
    encoder: Encoder,
    *,
    tokens_per_batch: int,
    limit: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Skill → share of right answers, as gates ask for them; see :func:`accuracies`."""
    found = accuracies(model, splits, encoder, tokens_per_batch=tokens_per_batch, limit=limit, dtype=dtype)
    return {skill: accuracy.value for skill, accuracy in found.items()}


def _most_likely(model: torch.nn.Module, batch: PackedBatch, where: torch.Tensor) -> torch.Tensor:
    """The most likely next token at some places ``[n]`` of a row; our own model makes logits of these alone."""
    if isinstance(model, Qwen3VL):
        return model.lm_head(model(batch).hidden_states.index_select(0, where)).argmax(dim=-1)
    logits = forward(model, batch, with_labels=False).logits[0]
    return logits.index_select(0, where).argmax(dim=-1)


def _batches(
    split: Split, samples: tuple[Sample, ...], encoder: Encoder, capacity: int, dtype: torch.dtype
) -> Iterator[tuple[list[int], PackedBatch]]:
    """Full rows, and which of ``samples`` each holds."""
    encoded = [encoder(sample.question, sample.answer) for sample in samples]
    groups, lengths = _by_image(samples, [len(sample.input_ids) for sample in encoded], capacity)
    for group_places in pack_sequences(lengths, capacity):
        places = sorted(place for group in group_places.tolist() for place in groups[group])
        images, owner = np.unique([samples[place].image for place in places], return_inverse=True)
        pixels = patchify(split.images[images], encoder.geometry)
        yield places, encoder.pack([encoded[place] for place in places], owner, pixels, dtype)


def _by_image(samples: tuple[Sample, ...], lengths: list[int], capacity: int) -> tuple[list[list[int]], list[int]]:
    """Groups of samples with one image, in as few parts of at most ``capacity`` tokens as their order allows; and the
    tokens of each group.

    Raises:
        ValueError: a sample is longer than a row.
    """
    groups: list[list[int]] = []
    tokens: list[int] = []
    newest: dict[int, int] = {}  # image → its last group
    for place, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        if length > capacity:
            raise ValueError(
                f"tokens_per_batch: expected at least {length}, the tokens of the question {sample.question!r}; "
                f"got {capacity}"
            )
        group = newest.get(sample.image)
        if group is None or tokens[group] + length > capacity:
            group = newest[sample.image] = len(groups)
            groups.append([])
            tokens.append(0)
        groups[group].append(place)
        tokens[group] += length
    return groups, tokens


def _text(encoder: Encoder, tokens: list[int]) -> str:
    end = encoder.end_token
    return encoder.tokenizer.decode(tokens[: tokens.index(end)] if end in tokens else tokens).strip()

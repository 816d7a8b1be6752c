"""A few held-out questions, answered by greedy decoding, token after token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from m4ov.data import Encoder, Sample, Split, patchify
from m4ov.data.tokenizer import prompt
from m4ov.generate import Engine, SamplingOptions
from m4ov.models.qwen3_vl import Qwen3VL
from m4ov_kernels.packing import Patches
from m4ov_kernels.packing import Sample as Asked

_TOKENS = 8  # of an answer, at most


@dataclass(frozen=True)
class Example:
    """One question, what the model said and what is true. ``image``: uint8 ``[size, size, 3]``."""

    image: np.ndarray
    question: str
    said: str
    answer: str
    kind: str

    @property
    def right(self) -> bool:
        return self.said == self.answer


def evenly(kinds: Sequence[str], images: Sequence[int], count: int, seed: int) -> list[int]:
    """Places of ``count`` questions of different images, drawn by ``seed``, one kind after the other; fewer, where
    there are not so many.

    Args:
        kinds, images: of each question.
    """
    order = np.random.default_rng(seed).permutation(len(kinds)).tolist()
    by_kind = {kind: [place for place in order if kinds[place] == kind] for kind in sorted(set(kinds))}
    chosen: list[int] = []
    seen: set[int] = set()
    while len(chosen) < count and any(by_kind.values()):
        for places in by_kind.values():
            while places and images[places[-1]] in seen:
                places.pop()
            if places and len(chosen) < count:
                chosen.append(places.pop())
                seen.add(images[chosen[-1]])
    return chosen


@torch.no_grad()
def examples(
    model: Any,
    split: Split,
    encoder: Encoder,
    count: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> list[Example]:
    """Answers to ``count`` questions of different images, drawn by ``seed``, one kind of question after the other.

    ``model``: this package's, or transformers' class.
    """
    asked = split.samples
    kinds, images = [sample.kind for sample in asked], [sample.image for sample in asked]
    chosen = [asked[place] for place in evenly(kinds, images, count, seed)]
    model.eval()
    answers = _engine if isinstance(model, Qwen3VL) else _transformers
    said = answers(model, split, encoder, chosen, dtype)
    return [
        Example(split.images[sample.image], sample.question, text.strip(), sample.answer, sample.kind)
        for sample, text in zip(chosen, said, strict=True)
    ]


def _engine(model: Qwen3VL, split: Split, encoder: Encoder, chosen: list[Sample], dtype: torch.dtype) -> list[str]:
    """Of our own model, all at once."""
    geometry = encoder.geometry
    prompts = []
    for sample in chosen:
        pixels = torch.from_numpy(patchify(split.images[sample.image][None], geometry)).to(dtype)
        ids = torch.tensor(encoder.tokenizer.encode(prompt(sample.question, geometry.tokens)).ids)
        prompts.append(Asked(ids, images=[Patches(pixels, geometry.grid_thw)]))
    engine = Engine(model, tokenizer=encoder.tokenizer, end_token_ids=[encoder.end_token], numerics="fast")
    made = engine.generate(prompts, SamplingOptions(max_tokens=_TOKENS, temperature=0))
    return [completions[0].text or "" for completions in made]


def _transformers(model: Any, split: Split, encoder: Encoder, chosen: list[Sample], dtype: torch.dtype) -> list[str]:
    """Of transformers' class, one after the other."""
    geometry, said = encoder.geometry, []
    for sample in chosen:
        asked = torch.tensor([encoder.tokenizer.encode(prompt(sample.question, geometry.tokens)).ids])
        answered = model.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            mm_token_type_ids=asked.eq(encoder.image_token).long(),
            pixel_values=torch.from_numpy(patchify(split.images[sample.image][None], geometry)).to(dtype),
            image_grid_thw=torch.tensor([geometry.grid_thw]),
            max_new_tokens=_TOKENS,
            do_sample=False,
        )
        said.append(encoder.tokenizer.decode(answered[0, asked.shape[1] :].tolist()))
    return said

"""A few held-out questions, answered by greedy decoding, token after token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from m4ov.data import Encoder, Sample, Split, patchify
from m4ov.data.tokenizer import prompt


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
    """Answers to ``count`` questions of different images, drawn by ``seed``, one kind of question after the other."""
    random = np.random.default_rng(seed)
    kinds = sorted({sample.kind for sample in split.samples})
    shuffled = [split.samples[place] for place in random.permutation(len(split.samples))]
    by_kind = {kind: [sample for sample in shuffled if sample.kind == kind] for kind in kinds}
    chosen: list[Sample] = []
    seen: set[int] = set()
    while len(chosen) < count and any(by_kind.values()):
        for kind in kinds:
            while by_kind[kind] and by_kind[kind][-1].image in seen:
                by_kind[kind].pop()
            if by_kind[kind] and len(chosen) < count:
                chosen.append(by_kind[kind].pop())
                seen.add(chosen[-1].image)
    model.eval()
    geometry = encoder.geometry
    told = []
    for sample in chosen:
        image = split.images[sample.image]
        asked = torch.tensor([encoder.tokenizer.encode(prompt(sample.question, geometry.tokens)).ids])
        answered = model.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            mm_token_type_ids=asked.eq(encoder.image_token).long(),
            pixel_values=torch.from_numpy(patchify(image[None], geometry)).to(dtype),
            image_grid_thw=torch.tensor([geometry.grid_thw]),
            max_new_tokens=8,
            do_sample=False,
        )
        text = encoder.tokenizer.decode(answered[0, asked.shape[1] :].tolist()).strip()
        told.append(Example(image, sample.question, text, sample.answer, sample.kind))
    return told

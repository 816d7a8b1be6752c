"""Tiny models and prompts for the engine, and what others make of the same: transformers' ``generate``, and a trainer
that scores what was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m4ov.generate import Completion, SamplingOptions
from m4ov.models.qwen3_vl import Qwen3VL
from m4ov_kernels import invariant, linear_logprob
from m4ov_kernels.packing import PackedBatch, Patches, Sample
from tests.kernels import tiny_models as tiny

END = 7  # a word that ends a completion
KINDS = {
    "text": lambda owner: [tiny.sample(owner, 13, []), tiny.sample(owner, 1, []), tiny.sample(owner, 30, [])],
    "an image": lambda owner: [tiny.sample(owner, 2, [(6, 4)]), tiny.sample(owner, 9, [(2, 2)])],
    "several images": lambda owner: [tiny.sample(owner, 4, [(2, 6), (6, 4), (10, 2)]), tiny.sample(owner, 5)],
    "a video": lambda owner: [tiny.sample(owner, 2, [], [(3, 4, 6)])],
}


def prompt(part: tiny.Sample) -> Sample:
    vision = part.vision
    images, videos = (
        Patches.split(vision[pixels], vision[grid]) if pixels in vision else []
        for pixels, grid in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
    )
    return Sample(part.input_ids[0], None, images, videos)


def words(*lengths: int) -> list[Sample]:
    """Prompts of random words."""
    return [Sample(torch.randint(tiny.WORDS, (length,))) for length in lengths]


def only_words(model: Any) -> Any:
    """The model, which now says nothing but words: no mark of images is ever likely."""
    head, table = model.lm_head.weight, model.get_input_embeddings().weight
    assert head is not table
    with torch.no_grad():
        head[tiny.WORDS :] = 0.0
    return model


def their_answer(theirs: Any, part: tiny.Sample, new: int) -> list[int]:
    """What transformers decodes greedily, up to and with the end token."""
    ids = part.input_ids
    with torch.no_grad():
        made = theirs.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=tiny.token_types(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=0,
            **part.vision,
        )
    answer: list[int] = made[0, ids.shape[1] :].tolist()
    return answer


def scored(
    model: Qwen3VL, asked: Sequence[tuple[Sample, Completion, SamplingOptions]], *, together: bool = True
) -> list[Tensor]:
    """Log-probabilities of the completions by a trainer's packed forward inside ``invariant()``, in training mode."""
    samples = [whole(prompt, made) for prompt, made, _ in asked]
    model.train()
    found: list[Tensor] = []
    for part in [range(len(samples))] if together else [range(i, i + 1) for i in range(len(samples))]:
        batch = packed([samples[place] for place in part])
        with invariant():
            hidden = model(batch).hidden_states
            for row, place in enumerate(part):
                _, made, options = asked[place]
                end = int(batch.cu_seqlens[row + 1])
                rows = hidden[end - len(made.tokens) - 1 : end - 1]
                temperature = float(options.temperature or 1.0)
                weight = model.lm_head.weight
                found.append(linear_logprob(rows, weight, made.tokens, temperature=temperature).logprob.detach())
    return found


def whole(prompt: Sample, made: Completion) -> Sample:
    """A prompt and its completion, all of which is text: the models here say marks of images, too."""
    types = torch.cat([tiny.token_types(prompt.input_ids).long(), torch.zeros_like(made.tokens)])
    return Sample(torch.cat([prompt.input_ids, made.tokens]), None, prompt.images, prompt.videos, types)


def packed(samples: Sequence[Sample]) -> PackedBatch:
    return PackedBatch.from_samples(samples, image_token_id=tiny.IMAGE, video_token_id=tiny.VIDEO, merge_size=2)


def same(ours: Sequence[Completion], theirs: Sequence[Completion]) -> None:
    """Tokens and the bits of log-probabilities."""
    assert [made.tokens.tolist() for made in ours] == [made.tokens.tolist() for made in theirs]
    assert [made.finish_reason for made in ours] == [made.finish_reason for made in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our.logprobs, their.logprobs), (our.logprobs - their.logprobs).abs().max()

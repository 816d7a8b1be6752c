"""A Qwen3-VL of a few thousand weights, batches of answers with and without images, and logits that are whole."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from m4ov.models.qwen3_vl import Config, Qwen3VL, TextConfig, VisionConfig, new
from m4ov.rl.responses import answered
from m4ov_kernels import pack_patches
from m4ov_kernels.packing import PackedBatch, Patches, Sample

IMAGE, VIDEO, START, END, WORDS = 48, 49, 46, 47, 50
VISION = {"image_token_id": IMAGE, "video_token_id": VIDEO}
CONFIG = Config(
    text=TextConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        mrope_section=(4, 2, 2),
        initializer_range=0.2,  # so that tokens and images matter
    ),
    vision=VisionConfig(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        patch_size=4,
        out_hidden_size=32,
        num_position_embeddings=16,
        deepstack_visual_indexes=(0,),
        initializer_range=0.2,
    ),
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=START,
    vision_end_token_id=END,
)


def model(seed: int = 0, dtype: torch.dtype = torch.float64, **text: object) -> Qwen3VL:
    """In float64 the operators are their references."""
    return new(replace(CONFIG, text=replace(CONFIG.text, **text)), seed=seed, dtype=dtype)  # type: ignore[arg-type]


def image(random: np.random.Generator, height: int = 16, width: int = 24) -> Patches:
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    packed = pack_patches(
        [pixels],
        patch_size=4,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        min_pixels=64,
        max_pixels=4096,
        input_data_format="channels_last",
        dtype=torch.float32,
    )
    return Patches.split(packed.pixel_values, packed.grid_thw)[0]


def prompt(random: np.random.Generator, images: tuple[Patches, ...] = (), words: int = 3) -> Sample:
    ids: list[int] = []
    for each in images:
        t, h, w = each.grid_thw
        ids += [START, *[IMAGE] * (t * h * w // 4), END]
    ids += random.integers(1, 40, words).tolist()
    return Sample(torch.tensor(ids, dtype=torch.int64), images=images)


def packed(prompts: list[Sample], lengths: list[int], random: np.random.Generator) -> PackedBatch:
    """Each prompt with an answer of so many random tokens; an image that several prompts hold is in the batch once."""
    answers = [torch.tensor(random.integers(1, 40, length).tolist(), dtype=torch.int64) for length in lengths]
    return PackedBatch.from_samples(
        [answered(each, tokens, **VISION) for each, tokens in zip(prompts, answers, strict=True)],
        **VISION,
        merge_size=2,
    )


def batch(seed: int, lengths: tuple[int, ...] = (4, 1, 6, 0, 3)) -> PackedBatch:
    """Two samples that share an image, one with another, one without, one with two."""
    random = np.random.default_rng(seed)
    first, second, third = image(random), image(random, 8, 16), image(random, 16, 16)
    shown = [(first,), (first,), (), (second,), (third, second)]
    prompts = [prompt(random, images, 2 + place) for place, images in enumerate(shown)]
    return packed(prompts[: len(lengths)], list(lengths), random)


def log_probabilities(policy: Qwen3VL, pack: PackedBatch, temperature: float = 1.0) -> list[Tensor]:
    """Of each sample alone, ``[answer's tokens, words]``, by whole logits."""
    found = []
    for place in range(len(pack)):
        alone = pack[place]
        hidden = policy(alone).hidden_states
        logits = hidden @ policy.lm_head.weight.T / temperature
        rows = (alone.labels != -100).nonzero()[:, 0] - 1
        found.append(logits[rows].log_softmax(-1))
    return found


def chosen(pack: PackedBatch) -> list[Tensor]:
    """The answers' tokens of each sample."""
    return [pack[place].labels[pack[place].labels != -100] for place in range(len(pack))]


def gradients(policy: Qwen3VL, loss: Tensor) -> dict[str, Tensor]:
    names = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    grads = torch.autograd.grad(loss, weights, allow_unused=True)
    return {
        name: torch.zeros_like(weight) if grad is None else grad
        for name, weight, grad in zip(names, weights, grads, strict=True)
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 1e-9) -> None:
    """Gradients, relative to the largest of all, so that none is compared with its own rounding."""
    size = max(grad.abs().max().item() for grad in theirs.values())
    assert size > 0
    for name, grad in theirs.items():
        torch.testing.assert_close(
            ours[name], grad, rtol=rtol, atol=rtol * size, msg=lambda said, n=name: f"{n}: {said}"
        )


@cache
def worlds_apart() -> tuple[Qwen3VL, Qwen3VL]:
    """Two policies that differ a little: one that has moved on from the other. Not to be changed."""
    one, other = model(0), model(0)
    with torch.no_grad():
        random = torch.Generator().manual_seed(3)
        for weight in one.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=random, dtype=weight.dtype)
    return one, other

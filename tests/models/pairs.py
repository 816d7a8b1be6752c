"""Our Qwen3-VL beside transformers', with the same random weights, and the same batches for both."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m4ov.models.qwen3_vl import Config, Qwen3VL
from m4ov_kernels.nn import load_balancing_loss
from m4ov_kernels.packing import PackedBatch, Patches, Sample
from tests.kernels import tiny_models as tiny
from tests.kernels.steps import Step

FAMILIES = ("qwen3_vl", "qwen3_vl_moe")


def drawn(family: str, **options: Any) -> tuple[Any, Qwen3VL]:
    """A random model of transformers', and ours: heads, depths, DeepStack, biases, a padding token, tied or not."""
    seed = random.Random(int(torch.randint(2**31, ())))
    depth = seed.choice([2, 3])
    options = {
        "heads": seed.choice([(4, 2), (4, 4), (6, 2), (2, 1), (3, 3)]),
        "head_dim": seed.choice([16, 32]),
        "layers": seed.choice([2, 3]),
        "tie": seed.random() < 0.4,
        "attention_bias": seed.random() < 0.3,
        "pad_token_id": seed.choice([None, 5]),  # a word of the samples'
        "vision": {
            "depth": depth,
            "deepstack_visual_indexes": sorted(seed.sample(range(depth), seed.choice([0, 1, 2]))),
        },
        **options,
    }
    theirs = tiny.model(family, **options)
    return theirs, ours_of(theirs)


def ours_of(theirs: Any) -> Qwen3VL:
    """Our model with the weights of one of transformers'."""
    ours = Qwen3VL(Config.from_dict(theirs.config.to_dict()))
    ours.load_state_dict(theirs.state_dict())
    return ours.train()


def batch_of(owner: Any, parts: Sequence[tiny.Sample]) -> PackedBatch:
    """The same samples as :func:`tests.kernels.tiny_models.packed` has."""
    samples = []
    for part in parts:
        vision = part.vision
        images, videos = (
            Patches.split(vision[pixels], vision[grid]) if pixels in vision else []
            for pixels, grid in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
        )
        samples.append(Sample(part.input_ids[0], part.labels[0], images, videos))
    return PackedBatch.from_samples(
        samples, image_token_id=tiny.IMAGE, video_token_id=tiny.VIDEO, merge_size=2, kind="qwen3_vl"
    )


def logits(model: Qwen3VL, batch: PackedBatch) -> Tensor:
    with torch.no_grad():
        made: Tensor = model.lm_head(model(batch).hidden_states)
    return made


def step(model: Qwen3VL, batch: PackedBatch, *, balance: bool = False) -> Step:
    """The mean loss, with or without the experts' balance loss, and every gradient."""
    model.zero_grad()
    loss = model.loss(batch)
    mean = loss.total / loss.num_labels
    if balance:
        coefficient = model.config.text.router_aux_loss_coef
        mean = mean + coefficient * load_balancing_loss(loss.loads, tokens=batch.tokens)
    mean.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return mean.detach(), {name: grad for name, grad in grads.items() if grad is not None}

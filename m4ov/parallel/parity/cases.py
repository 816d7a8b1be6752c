"""What the certificate computes on: a tiny Qwen3-VL, dense or with experts, and samples with images of many sizes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from m4ov.models.qwen3_vl import Config, Qwen3VL, TextConfig, VisionConfig, new
from m4ov_kernels.packing import PackedBatch, Patches, Sample

KINDS = ("dense", "moe")
IMAGE, VIDEO, WORDS = 156, 157, 150


def config(kind: str, heads: tuple[int, int] = (8, 4), bias: bool = False) -> Config:
    """DeepStack after every block of the tower; tied embeddings in the dense model. ``heads``: of queries, of keys;
    ``bias``: in the attention, which no published Qwen3-VL has."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24} if kind == "moe" else {}
    text = TextConfig(
        vocab_size=160,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=16,
        rope_theta=10000.0,
        mrope_section=(4, 2, 2),
        attention_bias=bias,
        pad_token_id=0,
        **experts,  # type: ignore[arg-type]
    )
    vision = VisionConfig(
        depth=2,
        hidden_size=32,
        intermediate_size=40,
        num_heads=2,
        patch_size=4,
        out_hidden_size=48,
        num_position_embeddings=36,
        deepstack_visual_indexes=(0, 1),
    )
    return Config(text, vision, tie_word_embeddings=kind == "dense", image_token_id=IMAGE, video_token_id=VIDEO)


def model(draw: Draw, dtype: torch.dtype = torch.float32) -> Qwen3VL:
    """Random weights: large enough that every part matters to the loss, small enough that float32 on one process has
    gradients within 1e-6 of float64's, so that what a layout adds can be seen."""
    made = new(draw.config, seed=draw.seed)
    generator = torch.Generator().manual_seed(draw.seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1, generator=generator)
            elif parameter.ndim == 1:
                parameter.normal_(1.0, 0.1, generator=generator)
            else:
                # routers that are sure of their choice
                scale = 2.0 if name.endswith("mlp.gate.weight") else 1.0 if "embed_tokens" in name else 0.3
                parameter.normal_(0.0, scale * parameter.shape[-1] ** -0.5, generator=generator)
    return made.to(dtype).train()


@dataclass(frozen=True)
class Draw:
    """A model and how its samples are drawn.

    Attributes:
        kind: of the model.
        heads: of queries, of keys.
        images: how many each sample has, at most.
        text_only: from which part of the samples on there are none: 0.5: the second half has none.
        longest: words of a sample, at most.
        bias: whether the attention has biases.
    """

    kind: str = "dense"
    heads: tuple[int, int] = (8, 4)
    samples: int = 8
    images: int = 2
    text_only: float = 0.5
    longest: int = 24
    seed: int = 0
    bias: bool = False

    @property
    def config(self) -> Config:
        return config(self.kind, self.heads, self.bias)


def samples(draw: Draw) -> list[Sample]:
    """Text with images inside, anywhere; of some samples no token counts, of some all."""
    config = draw.config
    rng, generator = random.Random(draw.seed), torch.Generator().manual_seed(draw.seed)
    made: list[Sample] = []
    for index in range(draw.samples):
        count = rng.randint(0, draw.images) if index < draw.text_only * draw.samples else 0
        if index == 0 and draw.text_only:
            count = max(count, 1)
        images = []
        for _ in range(count):
            grid = (1, 2 * rng.randint(1, 4), 2 * rng.randint(1, 3))
            pixels = torch.randn(grid[1] * grid[2], config.vision.patch_values, generator=generator)
            images.append(Patches(pixels, grid))
        words = [1 + int(WORDS * rng.random() ** 2) for _ in range(rng.randint(2, draw.longest))]
        places = sorted(rng.randint(0, len(words)) for _ in images)
        for place, image in zip(reversed(places), reversed(images), strict=True):
            words[place:place] = [IMAGE] * (image.grid_thw[1] * image.grid_thw[2] // 4)
        input_ids = torch.tensor(words)
        counts = torch.rand(len(words), generator=generator) < rng.choice([0.0, 0.3, 1.0, 1.0])
        labels = torch.where((input_ids != IMAGE) & counts, input_ids, -100)
        if index == 0:  # at least one label counts
            labels[-1] = words[-1] if words[-1] != IMAGE else 1
        made.append(Sample(input_ids, labels, images))
    return made


def share(draw: Draw, rank: int = 0, ranks: int = 1) -> PackedBatch:
    """The batch of one of ``ranks``: consecutive samples, packed."""
    return pack(draw.config, samples(draw), rank, ranks)


def pack(config: Config, samples: Sequence[Sample], rank: int = 0, ranks: int = 1) -> PackedBatch:
    bounds = [len(samples) * place // ranks for place in (rank, rank + 1)]
    return PackedBatch.from_samples(
        samples[slice(*bounds)],
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        merge_size=config.vision.spatial_merge_size,
    )

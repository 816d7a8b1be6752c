"""A Qwen3-VL with random weights in bf16, and packed batches with images for it, at the size of the 2B or tiny."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from m4ov_bench import cases


@dataclass(frozen=True)
class Size:
    """A model and a batch of ``samples`` packed into one row: each an image, then words, ``words`` of them on average,
    from half to one and a half times that. The last four words of the vocabulary are marks. ``image``: patches a side,
    a multiple of 2."""

    title: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    vision_depth: int
    vision_hidden: int
    vision_heads: int
    vision_intermediate: int
    patch: int
    deepstack: tuple[int, ...]
    samples: int
    image: int
    words: int
    labelled: float = 0.25

    @property
    def words_of_samples(self) -> list[int]:
        if self.samples == 1:
            return [self.words]
        return [self.words // 2 + self.words * index // (self.samples - 1) for index in range(self.samples)]

    @property
    def tokens(self) -> int:
        return self.samples * (self.image**2 // 4 + 2) + sum(self.words_of_samples)


QWEN3_VL_2B = Size("Qwen3-VL 2B", 2048, 28, 6144, 16, 8, 128, 151936, 24, 1024, 16, 4096, 16, (5, 11, 17), 8, 32, 766)
TINY = Size("tiny Qwen3-VL", 64, 3, 96, 4, 2, 16, 320, 3, 32, 2, 48, 4, (0, 1), 2, 4, 10)


def build(size: Size, device: torch.device) -> nn.Module:
    """Made on the device, in bf16 (rotary frequencies stay float32) and in training mode."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    half = size.head_dim // 2
    side = half * 5 // 16
    sections = [half - 2 * side, side, side]
    marks = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": size.vocabulary,
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.key_value_heads,
            "head_dim": size.head_dim,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": sections},
            "max_position_embeddings": 262144,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": size.vision_depth,
            "hidden_size": size.vision_hidden,
            "intermediate_size": size.vision_intermediate,
            "num_heads": size.vision_heads,
            "patch_size": size.patch,
            "out_hidden_size": size.hidden,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": list(size.deepstack),
        },
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        **{name: size.vocabulary - 4 + index for index, name in enumerate(marks)},
    )
    with torch.device(device):
        model = Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    return model.train()


def batch(owner: Any, size: Size, device: torch.device, samples: int | None = None) -> dict[str, Tensor]:
    """One row ``[1, T]`` of packed samples, with the positions of each for itself; a share of the words has labels."""
    size = replace(size, samples=samples or size.samples)
    image_token, _, start, end = range(size.vocabulary - 4, size.vocabulary)
    grid = torch.tensor([[1, size.image, size.image]])
    opening = torch.tensor([start, *[image_token] * (size.image**2 // 4), end])
    ids, positions, labels = [], [], []
    for count in size.words_of_samples:
        words = torch.randint(size.vocabulary - 4, (count,))
        sample = torch.cat([opening, words])[None]
        kinds = (sample == image_token).int()
        mrope, _ = owner.model.get_rope_index(sample, mm_token_type_ids=kinds, image_grid_thw=grid)
        ids.append(sample)
        positions.append(torch.cat([torch.arange(sample.shape[1])[None, None], mrope]))
        share = min(1.0, size.labelled * sample.shape[1] / count)
        target = cases.targets(cases.HeadCase(count, 1, size.vocabulary - 4, labelled=share))
        labels.append(torch.cat([torch.full_like(opening, -100), torch.where(target < 0, target, words)])[None])
    patches = size.samples * size.image**2
    made = {
        "input_ids": torch.cat(ids, 1),
        "mm_token_type_ids": (torch.cat(ids, 1) == image_token).int(),
        "position_ids": torch.cat(positions, 2),
        "labels": torch.cat(labels, 1),
        "pixel_values": torch.randn(patches, 3 * 2 * size.patch**2).to(torch.bfloat16),
        "image_grid_thw": grid.repeat(size.samples, 1),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}

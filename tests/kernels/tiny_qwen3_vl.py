"""A tiny Qwen3-VL of Hugging Face's, and batches for it: several samples with images, packed in one row or padded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

IMAGE, VIDEO, VISION_START, VISION_END, WORDS = 300, 301, 302, 303, 290
PATCH = 3 * 2 * 4 * 4  # values in one patch
HEAD_DIM = 16


def model(tie: bool = False, attention: str = "sdpa", **text: Any) -> Qwen3VLForConditionalGeneration:
    """About 170,000 parameters; weights large enough that attention is not uniform; in training mode."""
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": HEAD_DIM,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "max_position_embeddings": 512,
            "tie_word_embeddings": tie,
            **text,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tie,
        attn_implementation=attention,
    )
    made = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02 if "embed_tokens" in name else parameter[0].numel() ** -0.5)
            elif "norm" in name and "weight" in name:
                parameter.uniform_(0.5, 1.5)
    return made.train()


@dataclass(frozen=True)
class Sample:
    """One question with its image. ``positions``: ``[4, 1, T]``, text positions and M-RoPE's."""

    input_ids: Tensor
    positions: Tensor
    labels: Tensor
    pixel_values: Tensor
    grid: Tensor


def sample(owner: Qwen3VLForConditionalGeneration, words: int, height: int, width: int, frames: int = 0) -> Sample:
    """``words`` random words after an image (``frames`` = 0) of ``height`` x ``width`` patches; labels on half of them.

    With ``frames``, a video of so many frames instead, each with its own marks, as Qwen3-VL's processor writes them.
    """
    token, count = (VIDEO, frames) if frames else (IMAGE, 1)
    frame = [VISION_START, *[token] * (height * width // 4), VISION_END]
    head = torch.tensor(frame * count)
    input_ids = torch.cat([head, torch.randint(WORDS, (words,))])[None]
    grid = torch.tensor([[count, height, width]])
    grids = {"video_grid_thw": grid} if frames else {"image_grid_thw": grid}
    mrope, _ = owner.model.get_rope_index(input_ids, mm_token_type_ids=token_types(input_ids), **grids)
    positions = torch.cat([torch.arange(input_ids.shape[1])[None, None], mrope])
    labels = torch.full_like(input_ids, -100)
    labels[:, -(words // 2) :] = input_ids[:, -(words // 2) :]
    return Sample(input_ids, positions, labels, torch.randn(count * height * width, PATCH), grid)


def samples(owner: Qwen3VLForConditionalGeneration) -> list[Sample]:
    return [sample(owner, 7, 4, 4), sample(owner, 12, 4, 8), sample(owner, 9, 4, 4)]


def token_types(input_ids: Tensor) -> Tensor:
    return (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int()


def packed(parts: list[Sample]) -> dict[str, Tensor]:
    """One row ``[1, T]`` with the positions of each sample for itself."""
    input_ids = torch.cat([part.input_ids for part in parts], 1)
    return {
        "input_ids": input_ids,
        "mm_token_type_ids": token_types(input_ids),
        "position_ids": torch.cat([part.positions for part in parts], 2),
        "labels": torch.cat([part.labels for part in parts], 1),
        "pixel_values": torch.cat([part.pixel_values for part in parts]),
        "image_grid_thw": torch.cat([part.grid for part in parts]),
    }


def padded(parts: list[Sample]) -> dict[str, Tensor]:
    """One row for each sample, padded on the right."""
    longest = max(part.input_ids.shape[1] for part in parts)

    def rows(name: str, fill: int) -> Tensor:
        values = [getattr(part, name) for part in parts]
        return torch.cat([F.pad(value, (0, longest - value.shape[1]), value=fill) for value in values])

    input_ids = rows("input_ids", 0)
    attention = [F.pad(torch.ones_like(part.input_ids), (0, longest - part.input_ids.shape[1])) for part in parts]
    return {
        "input_ids": input_ids,
        "mm_token_type_ids": token_types(input_ids),
        "attention_mask": torch.cat(attention),
        "labels": rows("labels", -100),
        "pixel_values": torch.cat([part.pixel_values for part in parts]),
        "image_grid_thw": torch.cat([part.grid for part in parts]),
    }


def cu_seqlens(parts: list[Sample]) -> Tensor:
    lengths = torch.tensor([0, *(part.input_ids.shape[1] for part in parts)])
    return lengths.cumsum(0, dtype=torch.int32)

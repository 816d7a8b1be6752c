"""Packed batches of text, images and videos at random, and the positions that transformers' own models give them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from .draws import Draw

IMAGE, VIDEO, VOCABULARY = 90, 91, 100
MODELS = {"qwen3_vl": Qwen3VLModel, "qwen2_5_vl": Qwen2_5_VLModel}
TOKENS_PER_SECOND = 2


class Packed(NamedTuple):
    """One batch; ``lists``: of each sample the types of its tokens, its images' and its videos' grids, and seconds."""

    arguments: dict[str, Any]
    samples: list[tuple[list[int], list[list[int]], list[list[int]], list[float]]]


def draw_batch(draw: Draw, kind: str, merge_size: int, adjacent: bool = False) -> Packed:
    """``adjacent``: images may follow each other without a token between them, which transformers cannot read."""
    samples = [_sample(draw, kind, merge_size, adjacent) for _ in range(draw.integer(0, 4))]
    return Packed(arguments_of(samples, kind, merge_size), samples)


def draw_large(draw: Draw, kind: str) -> Packed:
    """Tens of thousands of tokens: several of the kernel's chunks, with bounds and images across their borders."""
    samples = []
    for _ in range(draw.integer(1, 6)):
        types: list[int] = []
        images, videos, seconds = [], [], []
        for _ in range(draw.integer(1, 6)):
            types += [0] * draw.choice((1, 7, 64, 700, 5000))
            height, width = draw.integer(1, 40), draw.integer(1, 40)
            if draw.boolean():
                frames = draw.integer(1, 6)
                videos.append([frames, 2 * height, 2 * width])
                seconds.append(draw.choice((0.5, 1.7, 12.0)))
                gap = [0] * draw.integer(1, 9) if kind == "qwen3_vl" else []
                types += (gap + [2] * (height * width)) * frames
            else:
                images.append([1, 2 * height, 2 * width])
                types += [1] * (height * width)
        samples.append((types + [0] * draw.integer(0, 9), images, videos, seconds))
    return Packed(arguments_of(samples, kind, 2), samples)


def _sample(
    draw: Draw, kind: str, merge: int, adjacent: bool
) -> tuple[list[int], list[list[int]], list[list[int]], list[float]]:
    types: list[int] = [0] * draw.integer(0, 5)
    images: list[list[int]] = []
    videos: list[list[int]] = []
    seconds: list[float] = []
    for _ in range(draw.integer(0, 3)):
        height, width = draw.integer(1, 4), draw.integer(1, 4)
        if draw.one_in(3):
            frames = draw.integer(1, 3)
            videos.append([frames, height * merge, width * merge])
            seconds.append(draw.choice((1.0, 0.5, 0.37, 3.3, 0.0, 11.9)))
            runs = [height * width] * frames if kind == "qwen3_vl" else [frames * height * width]
            gap = 2
        else:
            frames = 1 if not draw.one_in(8) else 2
            images.append([frames, height * merge, width * merge])
            runs, gap = [frames * height * width], 1
        for run in runs:
            least = 0 if adjacent or not types or types[-1] != gap else 1
            types += [0] * draw.integer(least, 3) + [gap] * run
    return types + [0] * draw.integer(0 if types else 1, 4), images, videos, seconds


def arguments_of(
    samples: list[tuple[list[int], list[list[int]], list[list[int]], list[float]]], kind: str, merge_size: int
) -> dict[str, Any]:
    types = torch.tensor([t for sample in samples for t in sample[0]], dtype=torch.int64)
    text = torch.randint(0, 80, types.shape)
    bounds = torch.tensor([0, *(len(sample[0]) for sample in samples)]).cumsum(0)
    arguments = {
        "input_ids": torch.where(types == 1, IMAGE, torch.where(types == 2, VIDEO, text)),
        "cu_seqlens": bounds,
        "mm_token_type_ids": types,
        "image_grid_thw": _grids([grid for sample in samples for grid in sample[1]]),
        "video_grid_thw": _grids([grid for sample in samples for grid in sample[2]]),
        "second_per_grid_ts": None,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "merge_size": merge_size,
        "kind": kind,
        "tokens_per_second": None,
    }
    if kind == "qwen2_5_vl" and arguments["video_grid_thw"] is not None:
        arguments["second_per_grid_ts"] = torch.tensor([value for sample in samples for value in sample[3]])
        arguments["tokens_per_second"] = TOKENS_PER_SECOND
    return arguments


def _grids(rows: list[list[int]]) -> Tensor | None:
    return torch.tensor(rows, dtype=torch.int64) if rows else None


def rope_index(packed: Packed) -> tuple[Tensor, Tensor]:
    """``get_rope_index`` of transformers, sample by sample: ``(position_ids [3, T], deltas [N])``."""
    kind, merge_size = packed.arguments["kind"], packed.arguments["merge_size"]
    positions, deltas = [torch.zeros(3, 0, dtype=torch.int64)], []
    for types, images, videos, seconds in packed.samples:
        if not types:
            deltas.append(torch.zeros(1, 1, dtype=torch.int64))
            continue
        model = rope_model(kind, merge_size)
        options = {"second_per_grid_ts": torch.tensor(seconds)} if kind == "qwen2_5_vl" and seconds else {}
        ids = torch.zeros(1, len(types), dtype=torch.int64)
        found, delta = MODELS[kind].get_rope_index(
            model, ids, torch.tensor([types]), image_grid_thw=_grids(images), video_grid_thw=_grids(videos), **options
        )
        positions.append(found[:, 0])
        deltas.append(delta)
    return torch.cat(positions, 1), torch.cat([delta[:, 0] for delta in deltas] or [torch.zeros(0, dtype=torch.int64)])


def rope_model(kind: str, merge_size: int) -> Any:
    """As much of a model as ``get_rope_index`` looks at: it reads nothing but two numbers of the configuration."""
    vision = SimpleNamespace(spatial_merge_size=merge_size, tokens_per_second=TOKENS_PER_SECOND)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    model.get_vision_position_ids = MODELS[kind].get_vision_position_ids.__get__(model)
    return model

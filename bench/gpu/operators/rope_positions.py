"""``mrope_positions`` for the GPU suite."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from m4ov_bench import cases, rope_positions
from m4ov_bench.gpu.example import Example, Maker
from m4ov_bench.session import Session, Subject
from m4ov_kernels import mrope_positions
from m4ov_kernels.rope import reference

_IMAGE, _VIDEO, _MERGE, _RATE = 90, 91, 2, 2
# Of each sample: text tokens (an int), images and videos (frames, rows and columns of merged patches).
_Item = int | tuple[str, int, int, int]
_SAMPLES: tuple[tuple[tuple[_Item, ...], ...], ...] = (
    ((5, ("image", 1, 3, 4), 2), (7,), (1, ("image", 1, 2, 2), 3, ("image", 1, 5, 1), 1)),
    ((300, ("image", 1, 40, 60), 1000, ("video", 1, 24, 24), 4, ("video", 1, 24, 24)),) * 3,
    ((1, ("video", 4, 9, 16), 30), (), (("image", 2, 3, 3), ("image", 1, 1, 1))),
    ((20000, ("image", 1, 128, 128), 9), (4000,)),
)


def examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    for number, samples in enumerate(_SAMPLES[:1] if tiny else _SAMPLES):
        for kind in ("qwen3_vl", "qwen2_5_vl"):
            yield _example(maker, samples, kind, typed=number % 2 == 0)


def _example(maker: Maker, samples: tuple[tuple[_Item, ...], ...], kind: str, typed: bool) -> Example:
    tokens: list[int] = []
    bounds = [0]
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    for sample in samples:
        for item in sample:
            if isinstance(item, int):
                tokens += [7] * item
                continue
            name, frames, rows, columns = item
            grids[name].append([frames, _MERGE * rows, _MERGE * columns])
            tokens += [_IMAGE if name == "image" else _VIDEO] * (frames * rows * columns)
        bounds.append(len(tokens))
    ids = torch.tensor(tokens, device=maker.device)
    cu_seqlens = torch.tensor(bounds, device=maker.device)
    images, videos = (torch.tensor(rows, dtype=torch.int64, device=maker.device).view(-1, 3) for rows in grids.values())
    types = (ids == _IMAGE).int() + 2 * (ids == _VIDEO).int() if typed else None
    whole = kind == "qwen2_5_vl" and bool(grids["video"])
    seconds = torch.full((len(grids["video"]),), 0.75, device=maker.device) if whole else None

    def function(input_ids: Tensor) -> tuple[Tensor, Tensor]:
        return mrope_positions(
            input_ids,
            cu_seqlens=cu_seqlens,
            mm_token_type_ids=types,
            image_grid_thw=images,
            video_grid_thw=videos,
            second_per_grid_ts=seconds,
            image_token_id=_IMAGE,
            video_token_id=_VIDEO,
            merge_size=_MERGE,
            kind=kind,
            tokens_per_second=_RATE if whole else None,
        )

    def definition(input_ids: Tensor) -> tuple[Tensor, Tensor]:
        intervals = None if seconds is None else _RATE * seconds
        return reference.mrope_positions(
            input_ids, cu_seqlens, types, images, videos, intervals, _IMAGE, _VIDEO, _MERGE
        )

    title = f"{kind}, {len(samples)} samples, {len(tokens)} tokens{', types given' * typed}"
    return Example(title, function, definition, (ids,), (), ("position_ids", "deltas"))


def subjects(session: Session, device: torch.device, tiny: bool) -> Iterator[Subject]:
    for case in cases.TINY_POSITIONS if tiny else cases.GPU_POSITIONS:
        with torch.device(device):
            made = rope_positions.subject(case)
        yield made

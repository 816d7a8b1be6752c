"""The definition of ``mrope_positions``, in plain PyTorch: no loop, and nothing that waits for a device."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_kernels.rope import values

TEXT, IMAGE, VIDEO = 0, 1, 2


class _Items(NamedTuple):
    """The images or the videos of a batch, one after the other, and one behind the last that is none, ``[n + 1]``.

    ``starts``: tokens of those before. ``travelled``: by how much those before move what follows. ``frames``, ``rows``,
    ``columns``: of merged patches. ``step``: by how much one unit moves what follows. A unit, which nothing may
    interrupt, is an item or, where ``by_frame``, one of its frames. ``interval``: of positions between frames.
    """

    starts: Tensor
    travelled: Tensor
    frames: Tensor
    rows: Tensor
    columns: Tensor
    step: Tensor
    interval: Tensor | None
    by_frame: bool
    valid: Tensor


class _Place(NamedTuple):
    """Where the token of some rank among all of its kind stands: its offset in its item, in its unit, row by row."""

    offset: Tensor
    within: Tensor
    steps: Tensor
    time: Tensor
    row: Tensor
    column: Tensor
    past_the_last: Tensor


def mrope_positions(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    mm_token_type_ids: Tensor | None,
    image_grid_thw: Tensor | None,
    video_grid_thw: Tensor | None,
    intervals: Tensor | None,
    image_token_id: int,
    video_token_id: int,
    merge_size: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`m4ov_kernels.rope.mrope_positions`; ``intervals``: float32, of positions between a video's frames;
    ``None``: each frame of a video is by itself."""
    arguments = (input_ids, cu_seqlens, mm_token_type_ids, image_grid_thw, video_grid_thw, intervals)
    position_ids, deltas, bad = _planned(*arguments, image_token_id, video_token_id, merge_size)
    # What only a GPU knows stays there: its wrong samples have positions of -1.
    if input_ids.device.type == "cpu" and not torch.compiler.is_compiling() and bool(bad.any()):
        values.refuse(*arguments, image_token_id, video_token_id, merge_size)
    return position_ids, deltas


def _planned(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    mm_token_type_ids: Tensor | None,
    image_grid_thw: Tensor | None,
    video_grid_thw: Tensor | None,
    intervals: Tensor | None,
    image_token_id: int,
    video_token_id: int,
    merge_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, deltas, and which samples are bad."""
    tokens, samples = input_ids.shape[0], cu_seqlens.shape[0] - 1
    device, bounds = input_ids.device, cu_seqlens.long()
    if samples == 0:
        bad = (bounds != 0).any().expand(1)
        return input_ids.new_zeros(3, tokens), input_ids.new_zeros(0), bad
    types = values.types_of(input_ids, mm_token_type_ids, image_token_id, video_token_id)
    token = torch.arange(tokens, device=device)
    sample = torch.searchsorted(bounds[1:].contiguous(), token, right=True).clamp(max=samples - 1)
    inside = bounds.clamp(0, tokens)
    before, before_bounds = token.clone(), inside.clone()  # what moves a token: text, and units of images and videos
    turns = torch.zeros(3, tokens, dtype=torch.int64, device=device)
    wrong = (types < TEXT) | (types > VIDEO)
    aligned = torch.ones(samples + 1, dtype=torch.bool, device=device)
    sound = (bounds.diff() >= 0).all() & (bounds[0] == 0) & (bounds[-1] == tokens)
    previous = F.pad(types, (1, 0), value=TEXT)[:tokens]
    for kind, grid in ((IMAGE, image_grid_thw), (VIDEO, video_grid_thw)):
        items = _items(grid, device, merge_size, intervals if kind == VIDEO else None, kind == VIDEO)
        here = types == kind
        ranks = F.pad(here.cumsum(0), (1, 0))  # [T + 1], tokens of this kind before
        place, at_bounds = _places(items, ranks[:tokens]), _places(items, ranks[inside])
        before = before - ranks[:tokens] + place.steps
        before_bounds = before_bounds - ranks[inside] + at_bounds.steps
        turns = turns + torch.where(here, torch.stack([place.time, place.row, place.column]), 0)
        wrong = wrong | here & (place.within > 0) & ((previous != kind) | (token == inside[sample]))
        aligned = aligned & (at_bounds.offset == 0)
        sound = sound & items.valid & at_bounds.past_the_last[-1]
    position_ids = before - before_bounds[sample] + turns
    ends = before_bounds.diff()
    highest = (ends - 1).scatter_reduce(0, sample, position_ids.amax(0), "amax")
    bad = torch.zeros(samples, dtype=torch.int64, device=device).scatter_reduce(0, sample, wrong.long(), "amax") > 0
    bad = bad | ~(aligned[1:] & aligned[:-1] & sound)
    return position_ids.masked_fill(bad[sample], -1), highest + 1 - bounds.diff(), bad


def _items(grid: Tensor | None, device: torch.device, merge_size: int, intervals: Tensor | None, video: bool) -> _Items:
    if grid is None:
        grid = torch.zeros(0, 3, dtype=torch.int64, device=device)
    frames, height, width = grid.clamp(1, 2**20).unbind(1)
    rows, columns = (height // merge_size).clamp(min=1), (width // merge_size).clamp(min=1)
    valid = ((grid > 0).all() & (grid <= 2**20).all()) & (grid[:, 1:] % merge_size == 0).all()
    by_frame = video and intervals is None
    step = torch.maximum(rows, columns)
    sizes, steps = frames * rows * columns, step * frames if by_frame else step
    if intervals is not None:
        valid = valid & ((intervals >= 0) & (intervals * frames < values.FARTHEST)).all()
        intervals = F.pad(intervals, (0, 1), value=1.0)
    starts, travelled = (F.pad(x.cumsum(0), (1, 0)) for x in (sizes, steps))
    frames, rows, columns, step = (F.pad(x, (0, 1), value=1) for x in (frames, rows, columns, step))
    return _Items(starts, travelled, frames, rows, columns, step, intervals, by_frame, valid)


def _places(items: _Items, rank: Tensor) -> _Place:
    item = torch.searchsorted(items.starts, rank, right=True) - 1
    offset = rank - items.starts[item]
    rows, columns = items.rows[item], items.columns[item]
    frame, in_frame = offset // (rows * columns), offset % (rows * columns)
    steps, within, time = items.travelled[item], offset, frame
    if items.by_frame:
        steps, within, time = steps + frame * items.step[item], in_frame, torch.zeros_like(frame)
    elif items.interval is not None:
        time = (frame * items.interval[item]).long()  # in float32, towards 0, as Hugging Face has it
    last = item == items.starts.shape[0] - 1
    return _Place(offset, within, steps, time, in_frame // columns, in_frame % columns, last)

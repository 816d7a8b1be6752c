"""``mrope_positions`` through the compiled kernels (CPU)."""

from __future__ import annotations

import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.layout import output
from m4ov_kernels.rope import values


def mrope_positions_fwd(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    mm_token_type_ids: Tensor | None,
    image_grid_thw: Tensor | None,
    video_grid_thw: Tensor | None,
    intervals: Tensor | None,
    image_token_id: int,
    video_token_id: int,
    merge_size: int,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(position_ids [3, T], deltas [N])``, int64."""
    tokens, samples = input_ids.shape[0], cu_seqlens.shape[0] - 1
    position_ids = output(out and out[0], (3, tokens), input_ids, torch.int64)
    deltas = output(out and out[1], (samples,), input_ids, torch.int64)
    typed = mm_token_type_ids is not None
    kinds = (input_ids if mm_token_type_ids is None else mm_token_type_ids).contiguous()
    bounds = cu_seqlens.long().contiguous()
    grids = [None if grid is None else grid.contiguous() for grid in (image_grid_thw, video_grid_thw)]
    images, videos = (0 if grid is None else grid.shape[0] for grid in grids)
    spans = None if intervals is None else intervals.contiguous()
    scratch = torch.empty(_C.mrope_positions_scratch(tokens, samples, images, videos), dtype=torch.int64)
    tensors = (position_ids, deltas, kinds, bounds, *grids, spans, scratch)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    codes = (1, 2) if typed else (image_token_id, video_token_id)
    sizes = (tokens, samples, images, videos, *codes, merge_size)
    if _C.mrope_positions(addresses, sizes, typed, kinds.dtype is torch.int32, torch.get_num_threads()):
        values.refuse(
            input_ids,
            cu_seqlens,
            mm_token_type_ids,
            image_grid_thw,
            video_grid_thw,
            intervals,
            image_token_id,
            video_token_id,
            merge_size,
        )
    return position_ids, deltas

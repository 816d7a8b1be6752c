"""The definition of ``interpolate_position_embeddings``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def interpolate_position_embeddings(
    table: Tensor, grid_thw: Tensor, hidden_states: Tensor | None, num_patches: int, merge_size: int, numerics: str
) -> Tensor:
    """See :func:`m4ov_kernels.vision.interpolate_position_embeddings`."""
    side, compute = math.isqrt(table.shape[0]), torch.promote_types(table.dtype, torch.float32)
    row, column, height, width = _places(grid_thw.to(table.device), num_patches, merge_size)
    rows, row_weights = _taps(row, height, side, compute)
    columns, column_weights = _taps(column, width, side, compute)
    corners = [(i, j) for i in (0, 1) for j in (0, 1)]
    # An embedding, not an index: the gradient of that is summed in any order. Times float32: not rounded.
    terms = [
        F.embedding(rows[i] * side + columns[j], table) * (row_weights[i] * column_weights[j])[:, None]
        for i, j in corners
    ]
    embeddings = terms[0] + terms[1] + terms[2] + terms[3]
    if hidden_states is None:
        return embeddings.to(table.dtype)
    if numerics == "hf":
        return hidden_states + embeddings.to(hidden_states.dtype)
    return (hidden_states + embeddings).to(hidden_states.dtype)


def _places(grid_thw: Tensor, num_patches: int, merge_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each patch in merge order, its row and column, and height and width of its image."""
    counts = grid_thw.prod(dim=1)  # [n]
    ends = counts.cumsum(0)
    patch = torch.arange(num_patches, device=grid_thw.device)
    image = torch.searchsorted(ends, patch, right=True)
    height, width = grid_thw[image, 1], grid_thw[image, 2]
    within = (patch - (ends - counts)[image]) % (height * width)
    block, rest = within // merge_size**2, within % merge_size**2
    blocks = width // merge_size
    row = block // blocks * merge_size + rest // merge_size
    column = block % blocks * merge_size + rest % merge_size
    return row, column, height, width


def _taps(index: Tensor, size: Tensor, side: int, compute: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The two places of the table around each index of an axis, and their weights."""
    x = index.to(compute) * (side - 1) / (size - 1).clamp(min=1)
    low = x.floor()
    places = [low.long().clamp(max=side - 1), (low.long() + 1).clamp(max=side - 1)]
    return places, [1 - (x - low), 1 - (x - low - 1).abs()]

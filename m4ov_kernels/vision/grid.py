"""``grid_thw``: frames, rows and columns of patches of each image or video, and the order in which patches come."""

from __future__ import annotations

import torch
from torch import Tensor

from m4ov_kernels.vision.checks import count_patches, refuse_count


def check_grid(operator: str, grid_thw: Tensor, merge_size: int, tokens: int) -> None:
    """Refuse a grid on the CPU whose values cannot be, or do not make up so many tokens; names the image."""
    if count_patches(operator, grid_thw, merge_size) != tokens:
        refuse_count(operator, grid_thw, tokens)


def positions_of(grid_thw: Tensor, merge_size: int, tokens: int) -> Tensor:
    """int64 ``[N, 2]``, row and column of each of so many patches: image after image, frame after frame, in blocks of
    ``merge_size²`` patches that will be merged. -1 past the end of the grid. No value is fetched from a device."""
    token = torch.arange(tokens, device=grid_thw.device)
    if grid_thw.shape[0] == 0:
        return token.new_full((tokens, 2), -1)
    count = grid_thw.long().prod(1)
    ends = count.cumsum(0)
    image = torch.searchsorted(ends, token, right=True)
    beyond = image == grid_thw.shape[0]
    image = image.clamp(max=grid_thw.shape[0] - 1)
    rows, columns = grid_thw.long()[image, 1:].unbind(1)
    patch = (token - (ends - count)[image]) % (rows * columns)
    block, inner = patch // merge_size**2, patch % merge_size**2
    across = columns // merge_size
    row = block // across * merge_size + inner // merge_size
    column = block % across * merge_size + inner % merge_size
    return torch.stack((row, column), -1).masked_fill(beyond[:, None], -1)

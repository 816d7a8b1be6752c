"""``grid_thw``: frames, rows and columns of patches of each image or video, and the order in which patches come."""

from __future__ import annotations

import torch
from torch import Tensor

from m4ov_kernels import checks


def check_grid(operator: str, grid_thw: Tensor, merge_size: int, tokens: int) -> None:
    """Refuse a grid on the CPU whose values cannot be, or do not make up so many tokens; names the image."""
    total = 0
    for i, (frames, rows, columns) in enumerate(grid_thw.tolist()):
        for what, value, multiple in (
            ("frames", frames, 1),
            ("rows", rows, merge_size),
            ("columns", columns, merge_size),
        ):
            if value <= 0 or value % multiple:
                expected = f"[frames, rows, columns], positive, the last two multiples of merge_size {merge_size}"
                came = f"{value} {what} of image {i}, {[frames, rows, columns]}"
                checks.refuse(ValueError, operator, "grid_thw", expected, came)
        total += frames * rows * columns
    if total != tokens:
        checks.refuse(ValueError, operator, "grid_thw", f"of {tokens} patches in all, as there are tokens", total)


def positions_of(grid_thw: Tensor, merge_size: int) -> Tensor:
    """int64 ``[N, 2]``, row and column of each patch: image after image, frame after frame, in blocks of
    ``merge_size²`` patches that will be merged."""
    made = [grid_thw.new_empty((0, 2), dtype=torch.int64)]
    for frames, rows, columns in grid_thw.tolist():
        place = torch.arange(rows * columns, device=grid_thw.device).view(rows, columns)
        place = place.unflatten(1, (-1, merge_size)).unflatten(0, (-1, merge_size)).transpose(1, 2).flatten()
        made.append(torch.stack((place // columns, place % columns), -1).repeat(frames, 1))
    return torch.cat(made)

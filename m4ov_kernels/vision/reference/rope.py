"""The definition of ``vision_rope``."""

from __future__ import annotations

import torch
from torch import Tensor

from m4ov_kernels.rope.frequencies import inverse_frequencies
from m4ov_kernels.vision.grid import check_grid, positions_of


def vision_rope(
    q: Tensor,
    k: Tensor,
    grid_thw: Tensor | None,
    positions: Tensor | None,
    merge_size: int,
    theta: float,
    numerics: str,
) -> tuple[Tensor, Tensor]:
    """See :func:`m4ov_kernels.vision.vision_rope`."""
    if positions is None:
        assert grid_thw is not None
        if not torch.compiler.is_compiling():  # which cannot look at values; patches without a place are NaN then
            check_grid("vision_rope", grid_thw, merge_size, q.shape[0])
        positions = positions_of(grid_thw, merge_size, q.shape[0])
    compute = torch.promote_types(q.dtype, torch.float32)
    exact = torch.float64 if numerics == "fp32" else torch.float32
    # [N, 2, D / 4]
    angles = positions[..., None].to(exact) * inverse_frequencies(theta, q.shape[-1] // 2, exact).to(q.device)
    if numerics != "fp32":
        angles = angles.to(compute)
    if grid_thw is not None:
        angles = angles.masked_fill(positions[..., None] < 0, torch.nan)
    # to [N, 1, D]: rows and columns, twice
    cos, sin = (f.flatten(1).repeat(1, 2).unsqueeze(1).to(compute) for f in (angles.cos(), angles.sin()))
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    exact = x.to(cos.dtype)
    first, second = exact.chunk(2, -1)
    return ((exact * cos) + (torch.cat((-second, first), -1) * sin)).to(x.dtype)

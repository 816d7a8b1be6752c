"""``vision_rope`` through the compiled kernels (CPU), which are those of the family ``rope``."""

from __future__ import annotations

import torch
from torch import Tensor

from m4ov_kernels.layout import NUMERICS
from m4ov_kernels.rope.frequencies import axial_tables
from m4ov_kernels.rope.native import rotation
from m4ov_kernels.vision.grid import check_grid


def vision_rope_fwd(
    q: Tensor,
    k: Tensor,
    grid_thw: Tensor | None,
    positions: Tensor | None,
    merge_size: int,
    theta: float,
    numerics: str,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(q, k)`` rotated, contiguous."""
    angles = _angles(q, grid_thw, positions, merge_size, theta, numerics)
    # Whatever the angles are, only what is written is rounded.
    return rotation.forward((q, k), (None, None), angles, q.shape[-1] // 2, 0.0, NUMERICS["fp32"], out)


def vision_rope_bwd(
    grad_q: Tensor,
    grad_k: Tensor,
    grid_thw: Tensor | None,
    positions: Tensor | None,
    merge_size: int,
    theta: float,
    numerics: str,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(grad_q, grad_k)``: the gradients, rotated back."""
    angles = _angles(grad_q, grid_thw, positions, merge_size, theta, numerics)
    no_weights = [] if out is None else [grad_q.new_empty(0)] * 2
    made = rotation.backward(
        (grad_q, grad_k),
        (None, None),
        (None, None),
        (False, False),
        angles,
        grad_q.shape[-1] // 2,
        0.0,
        None if out is None else [*out, *no_weights],
    )
    return made[0], made[1]


def _angles(
    q: Tensor, grid_thw: Tensor | None, positions: Tensor | None, merge_size: int, theta: float, numerics: str
) -> rotation.Angles:
    tables = axial_tables(theta, q.shape[-1], q.device)
    if positions is not None:
        return rotation.from_positions(positions.t(), 2, tables, numerics)
    assert grid_thw is not None
    check_grid("vision_rope", grid_thw, merge_size, q.shape[0])
    return rotation.from_grid(grid_thw.to(torch.int64).contiguous(), merge_size, tables, numerics)

"""Values that the host can see: positions and grids on the CPU."""

from __future__ import annotations

import math
from typing import NoReturn

from torch import Tensor

from m4ov_kernels import checks


def refuse_position(operator: str, positions: Tensor, index: int, rows: int) -> NoReturn:
    """``positions[index]`` is out of range, or was there before."""
    came = int(positions[index])
    raise ValueError(
        f"{operator}: positions[{index}] is {came}: expected 0 ≤ position < {rows}, and each position only once"
    )


def check_positions(operator: str, positions: Tensor, rows: int) -> None:
    """Refuse positions (int64 ``[N]``, on the CPU) outside ``[0, rows)`` or given twice, naming the first."""
    seen = set()
    for index, position in enumerate(positions.tolist()):
        if not 0 <= position < rows or position in seen:
            refuse_position(operator, positions, index, rows)
        seen.add(position)


def refuse_grid(operator: str, grid_thw: Tensor, index: int, merge_size: int) -> NoReturn:
    """``grid_thw[index]`` is none."""
    raise ValueError(
        f"{operator}: grid_thw[{index}] is {grid_thw[index].tolist()}: expected positive t, h and w, with h and w "
        f"multiples of {merge_size}"
    )


def refuse_count(operator: str, grid_thw: Tensor, num_patches: int) -> NoReturn:
    """The grids do not have ``num_patches`` patches."""
    came = sum(t * h * w for t, h, w in grid_thw.tolist())
    checks.refuse(ValueError, operator, "grid_thw", f"grids of {num_patches} patches in all", f"{came} patches")


def count_patches(operator: str, grid_thw: Tensor, merge_size: int) -> int:
    """How many patches the images of ``grid_thw`` (int64 ``[n, 3]``, on the CPU) have; refuses what is no grid."""
    total = 0
    for index, (t, h, w) in enumerate(grid_thw.tolist()):
        if min(t, h, w) < 1 or h % merge_size or w % merge_size:
            refuse_grid(operator, grid_thw, index, merge_size)
        total += t * h * w
    return total


def side_of(operator: str, table: Tensor) -> int:
    """The side S of a table ``[S·S, D]``."""
    side = math.isqrt(table.shape[0]) if table.ndim == 2 else 0
    if side == 0 or side * side != table.shape[0]:
        checks.refuse(ValueError, operator, "table", "[S·S, D], of a square grid", checks.describe(table))
    return side

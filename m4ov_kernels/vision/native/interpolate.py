"""``interpolate_position_embeddings`` through the compiled kernels (CPU)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.layout import DTYPES, NUMERICS, as_rows, output
from m4ov_kernels.vision.checks import refuse_count, refuse_grid, side_of

_OP = "interpolate_position_embeddings"


def interpolate_position_embeddings_fwd(
    table: Tensor,
    grid_thw: Tensor,
    hidden_states: Tensor | None,
    num_patches: int,
    merge_size: int,
    numerics: str,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The patches' position embeddings, plus ``hidden_states``; ``out``: contiguous, may be ``hidden_states``."""
    columns, side = table.shape[1], side_of(_OP, table)
    result = output(out, (num_patches, columns), table, table.dtype)
    table, grid_thw = table.contiguous(), grid_thw.contiguous()
    hidden, hidden_stride = (None, 0) if hidden_states is None else as_rows(hidden_states)
    found = _C.interpolate_fwd(
        result.data_ptr(),
        table.data_ptr(),
        0 if hidden is None else hidden.data_ptr(),
        grid_thw.data_ptr(),
        grid_thw.shape[0],
        num_patches,
        columns,
        side,
        hidden_stride,
        merge_size,
        NUMERICS[numerics],
        DTYPES[table.dtype],
        torch.get_num_threads(),
    )
    _refuse(found, grid_thw, num_patches, merge_size)
    return result


def interpolate_position_embeddings_bwd(
    grad_output: Tensor, grid_thw: Tensor, table_rows: int, merge_size: int, *, out: Tensor | None = None
) -> Tensor:
    """The gradient of ``table``; that of ``hidden_states`` is ``grad_output``."""
    num_patches, columns = grad_output.shape
    result = output(out, (table_rows, columns), grad_output, grad_output.dtype)
    (grad_output, grad_stride), grid_thw = as_rows(grad_output), grid_thw.contiguous()
    threads, side = torch.get_num_threads(), math.isqrt(table_rows)
    sums_columns = min(columns + 31, _C.sums_columns)
    sums = torch.empty(threads * (side + 1) * sums_columns)
    found = _C.interpolate_bwd(
        result.data_ptr(),
        sums.data_ptr(),
        grad_output.data_ptr(),
        grid_thw.data_ptr(),
        grid_thw.shape[0],
        num_patches,
        columns,
        side,
        grad_stride,
        merge_size,
        sums_columns,
        DTYPES[grad_output.dtype],
        threads,
    )
    _refuse(found, grid_thw, num_patches, merge_size)
    return result


def _refuse(found: int, grid_thw: Tensor, num_patches: int, merge_size: int) -> None:
    """-1: nothing is wrong; -2: the number of patches is; else the first grid that is."""
    if found == -2:
        refuse_count(_OP, grid_thw, num_patches)
    if found >= 0:
        refuse_grid(_OP, grid_thw, found, merge_size)

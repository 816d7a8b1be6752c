"""``rms_norm`` through the compiled kernels (CPU)."""

from __future__ import annotations

import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.gpu import NUMERICS, as_rows, output

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_rms_norm_fwd, _rms_norm_bwd, _get_num_threads = _C.rms_norm_fwd, _C.rms_norm_bwd, torch.get_num_threads
_empty, _empty_like = torch.empty, torch.empty_like
# Rows are summed in order within a block, then blocks in order. Enough blocks for many cores, few enough that the
# partial sums stay small beside the tensors; a function of the number of rows only.
_BLOCK_ROWS, _MAX_BLOCKS = 32, 64


def rms_norm_fwd(
    hidden_states: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    numerics: str,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(normed, new_residual, rstd)``; ``new_residual`` is empty without ``residual``, ``rstd`` float32 ``[rows]``."""
    columns = hidden_states.shape[-1]
    rows = hidden_states.numel() // columns
    if out is None:
        normed = output(None, hidden_states.shape, hidden_states, hidden_states.dtype)
        new_residual = hidden_states.new_empty(0) if residual is None else _empty_like(normed)
        rstd = _empty(rows, dtype=torch.float32)
    else:
        total_shape = (0,) if residual is None else hidden_states.shape
        normed = output(out[0], hidden_states.shape, hidden_states, hidden_states.dtype)
        new_residual = output(out[1], total_shape, hidden_states, hidden_states.dtype)
        rstd = output(out[2], (rows,), hidden_states, torch.float32)
    hidden_stride = residual_stride = columns
    if not hidden_states.is_contiguous():
        hidden_states, hidden_stride = as_rows(hidden_states)
    residual_address = 0
    if residual is not None:
        if not residual.is_contiguous():
            residual, residual_stride = as_rows(residual)
        residual_address = residual.data_ptr()
    if not weight.is_contiguous():
        weight = weight.contiguous()
    _rms_norm_fwd(
        normed.data_ptr(),
        new_residual.data_ptr(),
        rstd.data_ptr(),
        hidden_states.data_ptr(),
        weight.data_ptr(),
        residual_address,
        rows,
        columns,
        hidden_stride,
        residual_stride,
        eps,
        NUMERICS[numerics],
        _DTYPES[normed.dtype],
        _get_num_threads(),
    )
    return normed, new_residual, rstd


def rms_norm_bwd(
    grad_normed: Tensor,
    grad_residual: Tensor | None,
    hidden_states: Tensor,
    weight: Tensor,
    rstd: Tensor,
    numerics: str,
    need_weight: bool,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(grad_hidden_states, grad_weight)``, gradients of the unrounded function: ``numerics`` makes no difference.

    ``hidden_states``: what was normalised, the (rounded) sum if there was a residual. ``grad_residual``: added to
    ``grad_hidden_states``. ``grad_weight`` is empty unless ``need_weight``.
    """
    dtype, columns = hidden_states.dtype, hidden_states.shape[-1]
    rows = hidden_states.numel() // columns
    grad_hidden_states = output(out and out[0], hidden_states.shape, hidden_states, dtype)
    grad_weight = output(out and out[1], weight.shape if need_weight else (0,), hidden_states, dtype)
    blocks = min(_MAX_BLOCKS, (rows + _BLOCK_ROWS - 1) // _BLOCK_ROWS)
    grad_weight_address = partials_address = residual_address = residual_stride = 0
    if need_weight:
        padded = (columns + _C.partial_align - 1) // _C.partial_align * _C.partial_align
        partials = _empty(blocks * padded, dtype=torch.float32)
        grad_weight_address, partials_address = grad_weight.data_ptr(), partials.data_ptr()
    grad_normed, grad_stride = as_rows(grad_normed)
    hidden_states, hidden_stride = as_rows(hidden_states)
    if grad_residual is not None:
        grad_residual, residual_stride = as_rows(grad_residual)
        residual_address = grad_residual.data_ptr()
    if not weight.is_contiguous():
        weight = weight.contiguous()
    _rms_norm_bwd(
        grad_hidden_states.data_ptr(),
        grad_weight_address,
        partials_address,
        grad_normed.data_ptr(),
        residual_address,
        hidden_states.data_ptr(),
        weight.data_ptr(),
        rstd.data_ptr(),
        rows,
        columns,
        grad_stride,
        residual_stride,
        hidden_stride,
        blocks,
        _DTYPES[dtype],
        _get_num_threads(),
    )
    return grad_hidden_states, grad_weight

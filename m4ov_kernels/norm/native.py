"""The norms through the compiled kernels: C++ for CPU tensors; ``rms_norm`` also CUDA C++ for CUDA tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.gpu import current_device
from m4ov_kernels.layout import DTYPES, NUMERICS, as_rows, output, padded, row_blocks, vector

_empty_like, _get_num_threads = torch.empty_like, torch.get_num_threads


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
    hidden_stride = residual_stride = columns
    contiguous = hidden_states.is_contiguous()
    if out is None:
        normed = _empty_like(hidden_states) if contiguous else hidden_states.new_empty(hidden_states.shape)
        new_residual = hidden_states.new_empty(0) if residual is None else _empty_like(normed)
        rstd = hidden_states.new_empty(rows, dtype=torch.float32)
    else:
        total_shape = (0,) if residual is None else hidden_states.shape
        normed = output(out[0], hidden_states.shape, hidden_states, hidden_states.dtype)
        new_residual = output(out[1], total_shape, hidden_states, hidden_states.dtype)
        rstd = output(out[2], (rows,), hidden_states, torch.float32)
    if not contiguous:
        hidden_states, hidden_stride = as_rows(hidden_states)
    residual_address = 0
    if residual is not None:
        residual, residual_stride = as_rows(residual)
        residual_address = residual.data_ptr()
    if not weight.is_contiguous():
        weight = weight.contiguous()
    arguments = (
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
        DTYPES[normed.dtype],
    )
    if normed.is_cuda:
        with current_device(normed):
            _C.rms_norm_fwd_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        _C.rms_norm_fwd(*arguments, _get_num_threads())
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
    if hidden_states.is_cuda:
        blocks = _C.rms_norm_bwd_cuda_blocks(rows, columns)
    else:
        blocks = row_blocks(rows)
    grad_weight_address = partials_address = residual_address = residual_stride = 0
    if need_weight:
        partials = hidden_states.new_empty(blocks * padded(columns), dtype=torch.float32)
        grad_weight_address, partials_address = grad_weight.data_ptr(), partials.data_ptr()
    grad_normed, grad_stride = as_rows(grad_normed)
    hidden_states, hidden_stride = as_rows(hidden_states)
    if grad_residual is not None:
        grad_residual, residual_stride = as_rows(grad_residual)
        residual_address = grad_residual.data_ptr()
    if not weight.is_contiguous():
        weight = weight.contiguous()
    arguments = (
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
        DTYPES[dtype],
    )
    if grad_hidden_states.is_cuda:
        with current_device(grad_hidden_states):
            _C.rms_norm_bwd_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        _C.rms_norm_bwd(*arguments, _get_num_threads())
    return grad_hidden_states, grad_weight


def layer_norm_fwd(
    hidden_states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    numerics: str,
    *,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(normed, new_residual, mean, rstd)``; ``new_residual`` is empty without ``residual``, ``mean`` and ``rstd``
    float32 ``[rows]``."""
    columns = hidden_states.shape[-1]
    rows = hidden_states.numel() // columns
    total_shape = (0,) if residual is None else hidden_states.shape
    normed = output(out and out[0], hidden_states.shape, hidden_states, hidden_states.dtype)
    new_residual = output(out and out[1], total_shape, hidden_states, hidden_states.dtype)
    mean = output(out and out[2], (rows,), hidden_states, torch.float32)
    rstd = output(out and out[3], (rows,), hidden_states, torch.float32)
    hidden_states, hidden_stride = as_rows(hidden_states)
    residual_address = residual_stride = 0
    if residual is not None:
        residual, residual_stride = as_rows(residual)
        residual_address = residual.data_ptr()
    weight = vector(weight, hidden_states, 1.0)
    bias = vector(bias, hidden_states, -0.0)
    _C.layer_norm_fwd(
        normed.data_ptr(),
        new_residual.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        hidden_states.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        residual_address,
        rows,
        columns,
        hidden_stride,
        residual_stride,
        eps,
        NUMERICS[numerics],
        DTYPES[normed.dtype],
        _get_num_threads(),
    )
    return normed, new_residual, mean, rstd


def layer_norm_bwd(
    grad_normed: Tensor,
    grad_residual: Tensor | None,
    hidden_states: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_weight: bool,
    need_bias: bool,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad_hidden_states, grad_weight, grad_bias)``, gradients of the unrounded function.

    ``hidden_states``: what was normalised, the (rounded) sum if there was a residual. ``grad_residual``: added to
    ``grad_hidden_states``. ``grad_weight`` and ``grad_bias`` are empty unless they are needed.
    """
    dtype, columns = hidden_states.dtype, hidden_states.shape[-1]
    rows = hidden_states.numel() // columns
    grad_hidden_states = output(out and out[0], hidden_states.shape, hidden_states, dtype)
    grad_weight = output(out and out[1], (columns,) if need_weight else (0,), hidden_states, dtype)
    grad_bias = output(out and out[2], (columns,) if need_bias else (0,), hidden_states, dtype)
    blocks = row_blocks(rows)
    partials_address = residual_address = residual_stride = 0
    if need_weight or need_bias:
        partials = hidden_states.new_empty(2 * blocks * padded(columns), dtype=torch.float32)
        partials_address = partials.data_ptr()
    grad_normed, grad_stride = as_rows(grad_normed)
    hidden_states, hidden_stride = as_rows(hidden_states)
    if grad_residual is not None:
        grad_residual, residual_stride = as_rows(grad_residual)
        residual_address = grad_residual.data_ptr()
    weight = vector(weight, hidden_states, 1.0)
    _C.layer_norm_bwd(
        grad_hidden_states.data_ptr(),
        grad_weight.data_ptr() if need_weight else 0,
        grad_bias.data_ptr() if need_bias else 0,
        partials_address,
        grad_normed.data_ptr(),
        residual_address,
        hidden_states.data_ptr(),
        weight.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        rows,
        columns,
        grad_stride,
        residual_stride,
        hidden_stride,
        blocks,
        DTYPES[dtype],
        _get_num_threads(),
    )
    return grad_hidden_states, grad_weight, grad_bias

"""``scatter_vision`` and ``deepstack_add`` through the compiled kernels (CPU)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.layout import DTYPES, as_rows, output
from m4ov_kernels.vision.checks import refuse_position


def scatter_vision_fwd(
    inputs_embeds: Tensor, features: Tensor, positions: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """``inputs_embeds`` with ``features`` in the rows ``positions``; ``out``: contiguous, none of the inputs."""
    return _forward("scatter_vision", _C.scatter_vision_fwd, inputs_embeds, features, positions, out)


def deepstack_add_fwd(
    hidden_states: Tensor, features: Tensor, positions: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """``hidden_states`` with ``features`` added to the rows ``positions``; ``out``: contiguous, none of the inputs."""
    return _forward("deepstack_add", _C.deepstack_add_fwd, hidden_states, features, positions, out)


def _forward(
    operator: str, kernel: Callable[..., int], base: Tensor, features: Tensor, positions: Tensor, out: Tensor | None
) -> Tensor:
    result = output(out, base.shape, base, base.dtype)
    rows, columns = base.shape[:-1].numel(), base.shape[-1]
    (base, base_stride), (features, features_stride) = as_rows(base), as_rows(features)
    positions = positions.contiguous()
    source = torch.empty(rows, dtype=torch.int64)
    bad = kernel(
        result.data_ptr(),
        source.data_ptr(),
        base.data_ptr(),
        features.data_ptr(),
        positions.data_ptr(),
        rows,
        positions.shape[0],
        columns,
        base_stride,
        features_stride,
        DTYPES[base.dtype],
        torch.get_num_threads(),
    )
    if bad >= 0:
        refuse_position(operator, positions, bad, rows)
    return result


def scatter_vision_bwd(
    grad_output: Tensor,
    positions: Tensor,
    need_inputs_embeds: bool,
    need_features: bool,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(grad_inputs_embeds, grad_features)``; what is not needed is empty."""
    given, dtype = out or (None, None), grad_output.dtype
    grad_inputs = output(given[0], grad_output.shape if need_inputs_embeds else (0,), grad_output, dtype)
    rows = (positions.shape[0], grad_output.shape[-1])
    grad_features = output(given[1], rows if need_features else (0,), grad_output, dtype)
    _backward(
        "scatter_vision",
        grad_output,
        positions,
        grad_inputs if need_inputs_embeds else None,
        grad_features if need_features else None,
    )
    return grad_inputs, grad_features


def deepstack_add_bwd(grad_output: Tensor, positions: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The gradient of ``features``; that of ``hidden_states`` is ``grad_output``."""
    result = output(out, (positions.shape[0], grad_output.shape[-1]), grad_output, grad_output.dtype)
    _backward("deepstack_add", grad_output, positions, None, result)
    return result


def _backward(
    operator: str, grad_output: Tensor, positions: Tensor, grad_base: Tensor | None, grad_features: Tensor | None
) -> None:
    rows, columns = grad_output.shape[:-1].numel(), grad_output.shape[-1]
    grad_output, grad_stride = as_rows(grad_output)
    positions = positions.contiguous()
    source = torch.empty(0 if grad_base is None else rows, dtype=torch.int64)
    bad = _C.scatter_vision_bwd(
        0 if grad_base is None else grad_base.data_ptr(),
        0 if grad_features is None else grad_features.data_ptr(),
        source.data_ptr(),
        grad_output.data_ptr(),
        positions.data_ptr(),
        rows,
        positions.shape[0],
        columns,
        grad_stride,
        DTYPES[grad_output.dtype],
        torch.get_num_threads(),
    )
    if bad >= 0:
        refuse_position(operator, positions, bad, rows)

"""``swiglu`` through the compiled kernels (CPU)."""

from __future__ import annotations

import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.layout import DTYPES, NUMERICS, as_rows, output

_swiglu_fwd, _swiglu_bwd, _get_num_threads = _C.swiglu_fwd, _C.swiglu_bwd, torch.get_num_threads
_empty_like, _contiguous = torch.empty_like, torch.contiguous_format


def swiglu_fwd(gate: Tensor, up: Tensor, numerics: str, *, out: Tensor | None = None) -> Tensor:
    """``silu(gate) · up``, contiguous; ``out``: contiguous, may be one of the inputs."""
    if gate.is_contiguous() and up.is_contiguous():
        rows, columns = 1, gate.numel()
        gate_stride = up_stride = columns
        if out is None:
            out = _empty_like(gate)
        else:
            output(out, gate.shape, gate, gate.dtype)
    else:
        out = output(out, gate.shape, gate, gate.dtype)
        (gate, gate_stride), (up, up_stride) = as_rows(gate), as_rows(up)
        columns = gate.shape[-1]
        rows = gate.shape[:-1].numel()
    _swiglu_fwd(
        out.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        rows,
        columns,
        gate_stride,
        up_stride,
        NUMERICS[numerics],
        DTYPES[gate.dtype],
        _get_num_threads(),
    )
    return out


def swiglu_bwd(
    grad_output: Tensor, gate: Tensor, up: Tensor, numerics: str, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """``(grad_gate, grad_up)``, gradients of the unrounded function, so ``numerics`` makes no difference here."""
    grad_gate = output(out and out[0], gate.shape, gate, gate.dtype)
    grad_up = output(out and out[1], gate.shape, gate, gate.dtype)
    if grad_output.is_contiguous() and gate.is_contiguous() and up.is_contiguous():
        rows, columns = 1, gate.numel()
        grad_stride = gate_stride = up_stride = columns
    else:
        columns = gate.shape[-1]
        rows = gate.shape[:-1].numel()
        (grad_output, grad_stride), (gate, gate_stride), (up, up_stride) = map(as_rows, (grad_output, gate, up))
    _swiglu_bwd(
        grad_gate.data_ptr(),
        grad_up.data_ptr(),
        grad_output.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        rows,
        columns,
        grad_stride,
        gate_stride,
        up_stride,
        DTYPES[gate.dtype],
        _get_num_threads(),
    )
    return grad_gate, grad_up

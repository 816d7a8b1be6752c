"""The activations through the compiled kernels (CPU)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.layout import DTYPES, NUMERICS, as_rows, output, padded, row_blocks

_get_num_threads, _empty_like = torch.get_num_threads, torch.empty_like


def swiglu_fwd(gate: Tensor, up: Tensor, numerics: str, *, out: Tensor | None = None) -> Tensor:
    """``silu(gate) · up``, contiguous; ``out``: contiguous, may be one of the inputs."""
    return _gated_fwd(_C.swiglu_fwd, (NUMERICS[numerics],), gate, up, out)


def swiglu_bwd(
    grad_output: Tensor, gate: Tensor, up: Tensor, numerics: str, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """``(grad_gate, grad_up)``, gradients of the unrounded function, so ``numerics`` makes no difference here."""
    return _gated_bwd(_C.swiglu_bwd, (), grad_output, gate, up, out)


def geglu_fwd(gate: Tensor, up: Tensor, approximate: str, numerics: str, *, out: Tensor | None = None) -> Tensor:
    """``gelu(gate) · up``, contiguous; ``out``: contiguous, may be one of the inputs."""
    return _gated_fwd(_C.geglu_fwd, (approximate == "tanh", NUMERICS[numerics]), gate, up, out)


def geglu_bwd(
    grad_output: Tensor,
    gate: Tensor,
    up: Tensor,
    approximate: str,
    numerics: str,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(grad_gate, grad_up)``, gradients of the unrounded function, so ``numerics`` makes no difference here."""
    return _gated_bwd(_C.geglu_bwd, (approximate == "tanh",), grad_output, gate, up, out)


def gelu_fwd(input: Tensor, bias: Tensor | None, approximate: str, *, out: Tensor | None = None) -> Tensor:
    """``gelu(input + bias)``, contiguous; ``out``: contiguous, may be the input."""
    if out is None and input.is_contiguous():
        out = _empty_like(input)
    else:
        out = output(out, input.shape, input, input.dtype)
    input, input_stride, rows, columns = _rows(input, bias is None)
    bias_address = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_address = bias.data_ptr()
    _C.gelu_fwd(
        out.data_ptr(),
        input.data_ptr(),
        bias_address,
        rows,
        columns,
        input_stride,
        approximate == "tanh",
        DTYPES[out.dtype],
        _get_num_threads(),
    )
    return out


def gelu_bwd(
    grad_output: Tensor,
    input: Tensor,
    bias: Tensor | None,
    approximate: str,
    need_bias: bool,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(grad_input, grad_bias)``; ``grad_bias`` is empty unless ``need_bias``."""
    dtype, contiguous = input.dtype, bias is None and grad_output.is_contiguous() and input.is_contiguous()
    grad_input = output(out and out[0], input.shape, input, dtype)
    grad_bias = output(out and out[1], input.shape[-1:] if need_bias else (0,), input, dtype)
    input, input_stride, rows, columns = _rows(input, contiguous)
    grad_output, grad_stride, _, _ = _rows(grad_output, contiguous)
    blocks = row_blocks(rows)
    bias_address = grad_bias_address = partials_address = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_address = bias.data_ptr()
        if need_bias:
            partials = input.new_empty(blocks * padded(columns), dtype=torch.float32)
            grad_bias_address, partials_address = grad_bias.data_ptr(), partials.data_ptr()
    _C.gelu_bwd(
        grad_input.data_ptr(),
        grad_bias_address,
        partials_address,
        grad_output.data_ptr(),
        input.data_ptr(),
        bias_address,
        rows,
        columns,
        grad_stride,
        input_stride,
        blocks,
        approximate == "tanh",
        DTYPES[dtype],
        _get_num_threads(),
    )
    return grad_input, grad_bias


def _rows(tensor: Tensor, as_one: bool) -> tuple[Tensor, int, int, int]:
    """``(tensor, distance of its rows, rows, columns)``; ``as_one``: a contiguous tensor is one long row."""
    if as_one and tensor.is_contiguous():
        count = tensor.numel()
        return tensor, count, 1, count
    tensor, stride = as_rows(tensor)
    return tensor, stride, tensor.shape[:-1].numel(), tensor.shape[-1]


def _gated_fwd(
    kernel: Callable[..., None], options: tuple[int, ...], gate: Tensor, up: Tensor, out: Tensor | None
) -> Tensor:
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
    kernel(
        out.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        rows,
        columns,
        gate_stride,
        up_stride,
        *options,
        DTYPES[gate.dtype],
        _get_num_threads(),
    )
    return out


def _gated_bwd(
    kernel: Callable[..., None],
    options: tuple[int, ...],
    grad_output: Tensor,
    gate: Tensor,
    up: Tensor,
    out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    grad_gate = output(out and out[0], gate.shape, gate, gate.dtype)
    grad_up = output(out and out[1], gate.shape, gate, gate.dtype)
    if grad_output.is_contiguous() and gate.is_contiguous() and up.is_contiguous():
        rows, columns = 1, gate.numel()
        grad_stride = gate_stride = up_stride = columns
    else:
        columns = gate.shape[-1]
        rows = gate.shape[:-1].numel()
        (grad_output, grad_stride), (gate, gate_stride), (up, up_stride) = map(as_rows, (grad_output, gate, up))
    kernel(
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
        *options,
        DTYPES[gate.dtype],
        _get_num_threads(),
    )
    return grad_gate, grad_up

"""The quantisations of activations through the compiled kernels (CPU)."""

from __future__ import annotations

import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.gemm.quantize import scale_shape
from m4ov_kernels.gemm.reference_quantize import BLOCK, CODES
from m4ov_kernels.layout import DTYPES, NUMERICS, as_rows, output, scratch

_LINE = 64  # bytes


def quantize_int8_fwd(input: Tensor, *, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """``(codes int8 [..., K], scales float32 [..., 1])``."""
    codes, scales = _outputs(input, "int8", out)
    _quantize_rows(codes, scales, input, 0, False)
    return codes, scales


def quantize_fp8_fwd(
    input: Tensor, granularity: str, transposed: bool, *, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(values, scales, transposed values or an empty tensor)``."""
    values, scales = _outputs(input, "fp8", out, granularity)
    width, rows = input.shape[-1], input.shape[:-1].numel()
    turned = output(out and out[2], (width, rows) if transposed else (0,), input, values.dtype)
    if granularity == "block":
        input, stride = as_rows(input)
        _C.quantize_blocks(
            values.data_ptr(),
            turned.data_ptr() if transposed else 0,
            scales.data_ptr(),
            input.data_ptr(),
            rows,
            width,
            stride,
            DTYPES[input.dtype],
            torch.get_num_threads(),
        )
    else:
        _quantize_rows(values, scales, input, BLOCK if granularity == "group" else 0, True)
    return values, scales, turned


def rms_norm_quantize_fwd(
    hidden_states: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    numerics: str,
    dtype: str,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(codes, scales, sum)``; the sum is empty without ``residual``."""
    codes, scales = _outputs(hidden_states, dtype, out)
    shape = hidden_states.shape
    total = output(out and out[2], (0,) if residual is None else shape, hidden_states, hidden_states.dtype)
    rows, width, threads = shape[:-1].numel(), shape[-1], torch.get_num_threads()
    hidden_states, hidden_stride = as_rows(hidden_states)
    added, added_stride = (None, 0) if residual is None else as_rows(residual)
    weight = weight.contiguous()
    _memory, address = _scratch(hidden_states, threads)
    _C.rms_norm_quantize(
        codes.data_ptr(),
        scales.data_ptr(),
        0 if added is None else total.data_ptr(),
        address,
        hidden_states.data_ptr(),
        weight.data_ptr(),
        0 if added is None else added.data_ptr(),
        rows,
        width,
        hidden_stride,
        added_stride,
        eps,
        dtype == "fp8",
        NUMERICS[numerics],
        DTYPES[hidden_states.dtype],
        threads,
    )
    return codes, scales, total


def swiglu_quantize_fwd(
    gate: Tensor, up: Tensor, numerics: str, dtype: str, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """``(codes, scales)``."""
    codes, scales = _outputs(gate, dtype, out)
    rows, width, threads = gate.shape[:-1].numel(), gate.shape[-1], torch.get_num_threads()
    (gate, gate_stride), (up, up_stride) = as_rows(gate), as_rows(up)
    _memory, address = _scratch(gate, threads)
    _C.swiglu_quantize(
        codes.data_ptr(),
        scales.data_ptr(),
        address,
        gate.data_ptr(),
        up.data_ptr(),
        rows,
        width,
        gate_stride,
        up_stride,
        dtype == "fp8",
        NUMERICS[numerics],
        DTYPES[gate.dtype],
        threads,
    )
    return codes, scales


def _outputs(
    input: Tensor, dtype: str, out: tuple[Tensor, ...] | None, granularity: str = "row"
) -> tuple[Tensor, Tensor]:
    given = (None, None) if out is None else (out[0], out[1])
    codes = output(given[0], input.shape, input, CODES[dtype])
    return codes, output(given[1], scale_shape(input.shape, granularity), input, torch.float32)


def _quantize_rows(codes: Tensor, scales: Tensor, input: Tensor, group: int, fp8: bool) -> None:
    rows, width = input.shape[:-1].numel(), input.shape[-1]
    input, stride = as_rows(input)
    _C.quantize_rows(
        codes.data_ptr(),
        scales.data_ptr(),
        input.data_ptr(),
        rows,
        width,
        stride,
        group,
        fp8,
        DTYPES[input.dtype],
        torch.get_num_threads(),
    )


def _scratch(like: Tensor, threads: int) -> tuple[Tensor, int]:
    """A row for each thread, each of whole cache lines."""
    return scratch(threads * (-(-like.shape[-1] * like.element_size() // _LINE) * _LINE))

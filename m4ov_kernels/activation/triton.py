"""``swiglu`` in Triton, for CUDA and ROCm (and, interpreted, for CPU tensors)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from m4ov_kernels import configs
from m4ov_kernels.gpu import SIZES, Build, Work, current_device
from m4ov_kernels.layout import NUMERICS, as_rows, output


@triton.jit
def _tile(rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows, columns (int64: a dense tensor is one long row) and mask of this program's tile."""
    program = tl.cast(tl.program_id(0), tl.int64)
    blocks = tl.cdiv(tl.cast(width, tl.int64), BLOCK_D)
    row = (program // blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    return row[:, None], col[None, :], (row < rows)[:, None] & (col < width)[None, :]


@triton.jit(do_not_specialize=["rows"])
def _swiglu_fwd_kernel(
    gate_ptr,  # [rows, width], row stride given
    gate_stride,
    up_ptr,  # likewise
    up_stride,
    out_ptr,  # [rows, width]
    rows,
    width,
    NUMERICS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row, col, mask = _tile(rows, width, BLOCK_ROWS, BLOCK_D)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
    silu = gate / (1.0 + tl.exp(-gate))  # NaN for -inf, as PyTorch has it
    if NUMERICS != 2:
        silu = silu.to(dtype).to(tl.float32)
    tl.store(out_ptr + row * width + col, (silu * up).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _swiglu_bwd_kernel(
    grad_ptr,  # [rows, width], row stride given
    grad_stride,
    gate_ptr,  # likewise
    gate_stride,
    up_ptr,  # likewise
    up_stride,
    grad_gate_ptr,  # [rows, width]
    grad_up_ptr,  # [rows, width]
    rows,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype: tl.constexpr = grad_gate_ptr.dtype.element_ty
    row, col, mask = _tile(rows, width, BLOCK_ROWS, BLOCK_D)
    grad = tl.load(grad_ptr + row * grad_stride + col, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    place = row * width + col
    tl.store(grad_up_ptr + place, (grad * gate * sigmoid).to(dtype), mask=mask)
    slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(grad_gate_ptr + place, (grad * up * slope).to(dtype), mask=mask)


def _launch(name: str, kernel: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], **flags: Any) -> None:
    count, width = inputs[0].numel(), inputs[0].shape[-1] if inputs[0].ndim else 1
    if count == 0:
        return
    if all(tensor.is_contiguous() for tensor in inputs):
        width, config = count, configs.get(name, inputs[0])  # one long row
        operands: list[Any] = [operand for tensor in inputs for operand in (tensor, count)]
    else:
        config = configs.get(name, inputs[0], width)
        operands = [operand for tensor in inputs for operand in as_rows(tensor)]
    rows = count // width
    blocks = triton.cdiv(rows, config.constexprs["BLOCK_ROWS"]) * triton.cdiv(width, config.constexprs["BLOCK_D"])
    with current_device(inputs[0]):
        kernel[(blocks,)](*operands, *outputs, rows, width, **flags, **config.options())


def swiglu_fwd(gate: Tensor, up: Tensor, numerics: str, *, out: Tensor | None = None) -> Tensor:
    """``silu(gate) · up``, contiguous; ``out``: contiguous, may be one of the inputs."""
    result = output(out, gate.shape, gate, gate.dtype)
    _launch("swiglu_fwd", _swiglu_fwd_kernel, (gate, up), (result,), NUMERICS=NUMERICS[numerics])
    return result


def swiglu_bwd(
    grad_output: Tensor, gate: Tensor, up: Tensor, numerics: str, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """``(grad_gate, grad_up)``, gradients of the unrounded function, so ``numerics`` makes no difference here."""
    grad_gate = output(out and out[0], gate.shape, gate, gate.dtype)
    grad_up = output(out and out[1], gate.shape, gate, gate.dtype)
    _launch("swiglu_bwd", _swiglu_bwd_kernel, (grad_output, gate, up), (grad_gate, grad_up))
    return grad_gate, grad_up


def _work(rows: int, width: int, dtype: str, tensors: int, operations: int) -> Work:
    count = rows * width
    return Work(f"[{rows}, {width}]", tensors * count * SIZES[dtype], operations * count)


def _declared() -> list[Build]:
    """Every row of the tables for every dtype: dense tensors are one long row, others have gaps between theirs."""
    builds = []
    rows_of = "*T/16 i32/16"
    fwd = f"{rows_of} {rows_of} *T/16 i32 i32/16"
    bwd = f"{rows_of} {rows_of} {rows_of} *T/16 *T/16 i32 i32/16"
    for dtype in SIZES:
        for row, targets in configs.shipped("swiglu_fwd", dtype):
            note, config = f"D {row.width}" if row.width else "dense", row.config
            work = _work(4096, row.width or 4096, dtype, 3, 5)  # exp, two of the quotient, two products
            for numerics in ("hf", "fp32") if dtype == "bf16" and row.width is None else ("hf",):
                flags = {"NUMERICS": NUMERICS[numerics], **config.constexprs}
                warps, title = (config.num_warps, config.num_stages), f"{note}, {numerics}"
                builds.append(
                    Build(_swiglu_fwd_kernel, dtype, fwd, flags, *warps, note=title, work=work, targets=targets)
                )
        for row, targets in configs.shipped("swiglu_bwd", dtype):
            note, config = f"D {row.width}" if row.width else "dense", row.config
            work = _work(4096, row.width or 4096, dtype, 5, 11)
            warps = (config.num_warps, config.num_stages)
            builds.append(
                Build(_swiglu_bwd_kernel, dtype, bwd, config.constexprs, *warps, note=note, work=work, targets=targets)
            )
    return builds


KERNELS = _declared()

"""``swiglu`` in Triton, for CUDA and ROCm (and, interpreted, for CPU tensors)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from m4ov_kernels.gpu import Build, Config, current_device
from m4ov_kernels.layout import NUMERICS, as_rows, output

_TILE = 2048  # elements of one program: 16 per thread with 4 warps


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


@lru_cache(maxsize=1024)
def _config(width: int) -> Config:
    block = min(_TILE, triton.next_power_of_2(width))
    return Config({"BLOCK_ROWS": _TILE // block, "BLOCK_D": block}, num_warps=4)


def _launch(kernel: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], **flags: Any) -> None:
    count, width = inputs[0].numel(), inputs[0].shape[-1] if inputs[0].ndim else 1
    if count == 0:
        return
    if all(tensor.is_contiguous() for tensor in inputs):
        width = count  # one long row
        operands: list[Any] = [operand for tensor in inputs for operand in (tensor, count)]
    else:
        operands = [operand for tensor in inputs for operand in as_rows(tensor)]
    rows = count // width
    config = _config(width)
    blocks = triton.cdiv(rows, config.constexprs["BLOCK_ROWS"]) * triton.cdiv(width, config.constexprs["BLOCK_D"])
    with current_device(inputs[0]):
        kernel[(blocks,)](*operands, *outputs, rows, width, **flags, **config.options())


def swiglu_fwd(gate: Tensor, up: Tensor, numerics: str, *, out: Tensor | None = None) -> Tensor:
    """``silu(gate) · up``, contiguous; ``out``: contiguous, may be one of the inputs."""
    result = output(out, gate.shape, gate, gate.dtype)
    _launch(_swiglu_fwd_kernel, (gate, up), (result,), NUMERICS=NUMERICS[numerics])
    return result


def swiglu_bwd(
    grad_output: Tensor, gate: Tensor, up: Tensor, numerics: str, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """``(grad_gate, grad_up)``, gradients of the unrounded function, so ``numerics`` makes no difference here."""
    grad_gate = output(out and out[0], gate.shape, gate, gate.dtype)
    grad_up = output(out and out[1], gate.shape, gate, gate.dtype)
    _launch(_swiglu_bwd_kernel, (grad_output, gate, up), (grad_gate, grad_up))
    return grad_gate, grad_up


def _declared() -> list[Build]:
    builds = []
    # Dense tensors of any width are one long row; narrow rows with gaps are the other shape of tile.
    for dtype, width in (("bf16", 1 << 20), ("bf16", 512), ("fp16", 1 << 20), ("fp32", 1 << 20)):
        config = _config(width)
        note = "dense" if width >= _TILE else f"D {width}"
        rows = "*T/16 i32/16"
        fwd = f"{rows} {rows} *T/16 i32 i32/16"
        bwd = f"{rows} {rows} {rows} *T/16 *T/16 i32 i32/16"
        for numerics in ("hf", "fp32") if (dtype, width) == ("bf16", 1 << 20) else ("hf",):
            flags = {"NUMERICS": NUMERICS[numerics], **config.constexprs}
            builds.append(Build(_swiglu_fwd_kernel, dtype, fwd, flags, config.num_warps, note=f"{note}, {numerics}"))
        builds.append(Build(_swiglu_bwd_kernel, dtype, bwd, config.constexprs, config.num_warps, note=note))
    return builds


KERNELS = _declared()

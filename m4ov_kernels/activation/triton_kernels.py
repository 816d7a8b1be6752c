"""The Triton kernels of the activations; ``triton.py`` launches them."""

from __future__ import annotations

import triton
import triton.language as tl

FUNCTIONS = {"silu": 0, "tanh": 1, "none": 2}  # GELU by its approximation


@triton.jit
def _exp_minus_2u(x):
    """exp(-2u) with u = sqrt(2/pi) (x + 0.044715 x³): the tanh approximation is x · sigmoid(2u)."""
    return tl.exp(-x * (1.5957691216057308 + 0.07135481282553748 * x * x))


@triton.jit
def _activate(x, FUNCTION: tl.constexpr):
    if FUNCTION == 0:
        return x / (1.0 + tl.exp(-x))  # NaN for -inf, as PyTorch has it
    elif FUNCTION == 1:
        return x / (1.0 + _exp_minus_2u(x))
    else:
        return x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))


@triton.jit
def _slope(x, FUNCTION: tl.constexpr):
    if FUNCTION == 0:
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        return sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif FUNCTION == 1:
        exponential = _exp_minus_2u(x)
        sigmoid = 1.0 / (1.0 + exponential)
        rest = tl.minimum(exponential, 3.4028234663852886e38) * sigmoid  # 1 - sigmoid, without cancellation
        square = tl.minimum(x * x, 1e30)  # infinite, it would meet a sigmoid of 0
        derivative = 1.5957691216057308 + 3 * 0.07135481282553748 * square  # of 2u
        return sigmoid + x * (sigmoid * rest) * derivative
    else:
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327
        return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476) + x * density


@triton.jit
def _tile(rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows, columns (int64: a dense tensor is one long row) and mask of this program's tile."""
    program = tl.cast(tl.program_id(0), tl.int64)
    blocks = tl.cdiv(tl.cast(width, tl.int64), BLOCK_D)
    row = (program // blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    return row[:, None], col[None, :], (row < rows)[:, None] & (col < width)[None, :]


@triton.jit(do_not_specialize=["rows"])
def _gated_fwd_kernel(
    gate_ptr,  # [rows, width], row stride given
    gate_stride,
    up_ptr,  # likewise
    up_stride,
    out_ptr,  # [rows, width]
    rows,
    width,
    FUNCTION: tl.constexpr,
    NUMERICS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row, col, mask = _tile(rows, width, BLOCK_ROWS, BLOCK_D)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
    activated = _activate(gate, FUNCTION)
    if NUMERICS != 2:
        activated = activated.to(dtype).to(tl.float32)
    tl.store(out_ptr + row * width + col, (activated * up).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _gated_bwd_kernel(
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
    FUNCTION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype: tl.constexpr = grad_gate_ptr.dtype.element_ty
    row, col, mask = _tile(rows, width, BLOCK_ROWS, BLOCK_D)
    grad = tl.load(grad_ptr + row * grad_stride + col, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
    place = row * width + col
    tl.store(grad_up_ptr + place, (grad * _activate(gate, FUNCTION)).to(dtype), mask=mask)
    tl.store(grad_gate_ptr + place, (grad * up * _slope(gate, FUNCTION)).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _gelu_fwd_kernel(
    input_ptr,  # [rows, width], row stride given
    input_stride,
    bias_ptr,  # [width], or unused
    out_ptr,  # [rows, width]
    rows,
    width,
    FUNCTION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, col, mask = _tile(rows, width, BLOCK_ROWS, BLOCK_D)
    x = tl.load(input_ptr + row * input_stride + col, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + col, _activate(x, FUNCTION).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _gelu_bwd_kernel(
    grad_ptr,  # [rows, width], row stride given
    grad_stride,
    input_ptr,  # likewise
    input_stride,
    bias_ptr,  # [width], or unused
    grad_input_ptr,  # [rows, width]
    partial_ptr,  # fp32 [programs of axis 1, width], or unused
    rows,
    width,
    FUNCTION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of columns, every n-th block of rows; the bias's partial gradients are per program, in row order."""
    program = tl.program_id(1)
    col = tl.cast(tl.program_id(0), tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    grad_bias = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    for block in range(program, tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(1)):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & (col < width)[None, :]
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(input_ptr + row[:, None] * input_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        grad *= _slope(x + bias[None, :], FUNCTION)
        place = row[:, None] * width + col[None, :]
        tl.store(grad_input_ptr + place, grad.to(grad_input_ptr.dtype.element_ty), mask=mask)
        if NEED_BIAS:
            grad_bias += tl.where(mask, grad, 0.0)
    if NEED_BIAS:
        place = tl.cast(program, tl.int64) * width + col
        tl.store(partial_ptr + place, tl.sum(grad_bias, axis=0), mask=col < width)

"""The Triton kernels of ``permute`` and ``unpermute``; ``triton_rows.py`` launches them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows and columns (int64) of this program's tile."""
    program = tl.cast(tl.program_id(0), tl.int64)
    blocks = tl.cdiv(width, BLOCK_D)
    row = (program // blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    return row, col, (row < rows)[:, None] & (col < width)[None, :]


@triton.jit(do_not_specialize=["rows", "top_k"])
def _permute_fwd_kernel(
    hidden_ptr,  # [tokens, width], row stride given
    hidden_stride,
    slots_ptr,  # int64 [rows]: t · top_k + k of every row
    valid_ptr,  # int32 [1]: how many rows, the first ones, have an expert
    rows_ptr,  # [rows, width]
    flag_ptr,  # int64 [1]
    rows,
    width,
    top_k,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, col, mask = _tile(rows, width, BLOCK_ROWS, BLOCK_D)
    slot = tl.load(slots_ptr + row, mask=row < rows, other=0)
    valid = row < tl.load(valid_ptr)
    source = (slot // top_k)[:, None] * hidden_stride + col[None, :]
    x = tl.load(hidden_ptr + source, mask=mask & valid[:, None], other=0.0)
    nothing = tl.full([BLOCK_ROWS, BLOCK_D], float("nan"), tl.float32).to(x.dtype)
    tl.store(rows_ptr + row[:, None] * width + col[None, :], tl.where(valid[:, None], x, nothing), mask=mask)
    tl.atomic_min(flag_ptr + tl.zeros([BLOCK_ROWS], tl.int64), slot, mask=(row < rows) & (valid == 0))


@triton.jit(do_not_specialize=["tokens", "top_k"])
def _unpermute_fwd_kernel(
    rows_ptr,  # [tokens · top_k, width], row stride given
    rows_stride,
    order_ptr,  # int32 [tokens, top_k]
    weights_ptr,  # fp32 [tokens, top_k], or unused
    out_ptr,  # [tokens, width]
    flag_ptr,  # int64 [1]
    tokens,
    width,
    top_k,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token, col, mask = _tile(tokens, width, BLOCK_ROWS, BLOCK_D)
    total = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for k in range(top_k):
        slot = token * top_k + k
        row = tl.load(order_ptr + slot, mask=token < tokens, other=0).to(tl.int64)
        inside = (row >= 0) & (row < tl.cast(tokens, tl.int64) * top_k)
        place = row[:, None] * rows_stride + col[None, :]
        x = tl.load(rows_ptr + place, mask=mask & inside[:, None], other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            x *= tl.load(weights_ptr + slot, mask=token < tokens, other=0.0)[:, None]
        total += tl.where(inside[:, None], x, float("nan"))
        tl.atomic_min(flag_ptr + tl.zeros([BLOCK_ROWS], tl.int64), slot, mask=(token < tokens) & (inside == 0))
    tl.store(out_ptr + token[:, None] * width + col[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "top_k"])
def _unpermute_rows_bwd_kernel(
    grad_ptr,  # [tokens, width], row stride given
    grad_stride,
    slots_ptr,  # int64 [rows]: t · top_k + k of every row, or -1
    weights_ptr,  # fp32 [rows] by slot, or unused
    grad_rows_ptr,  # [rows, width]
    rows,
    width,
    top_k,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, col, mask = _tile(rows, width, BLOCK_ROWS, BLOCK_D)
    slot = tl.load(slots_ptr + row, mask=row < rows, other=-1)
    taken = slot >= 0
    source = (slot // top_k)[:, None] * grad_stride + col[None, :]
    grad = tl.load(grad_ptr + source, mask=mask & taken[:, None], other=0.0).to(tl.float32)
    if HAS_WEIGHTS:
        grad *= tl.load(weights_ptr + slot, mask=taken, other=0.0)[:, None]
    grad = tl.where(taken[:, None], grad, float("nan")).to(grad_rows_ptr.dtype.element_ty)
    tl.store(grad_rows_ptr + row[:, None] * width + col[None, :], grad, mask=mask)


@triton.jit(do_not_specialize=["slots", "top_k"])
def _unpermute_weights_bwd_kernel(
    grad_ptr,  # [tokens, width], row stride given
    grad_stride,
    rows_ptr,  # [slots, width], row stride given
    rows_stride,
    order_ptr,  # int32 [slots]
    slots_ptr,  # int64 [slots]: as above
    grad_weights_ptr,  # fp32 [slots]
    flag_ptr,  # int64 [1]
    slots,
    width,
    top_k,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slot = tl.cast(tl.program_id(0), tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.load(order_ptr + slot, mask=slot < slots, other=0).to(tl.int64)
    inside = (slot < slots) & (row >= 0) & (row < slots)
    inside &= tl.load(slots_ptr + row, mask=inside, other=-1) == slot  # else the row is another's too
    total = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for first in range(0, width, BLOCK_D):
        col = first + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (col < width)[None, :]
        grad = tl.load(grad_ptr + (slot // top_k)[:, None] * grad_stride + col[None, :], mask=mask, other=0.0)
        x = tl.load(rows_ptr + row[:, None] * rows_stride + col[None, :], mask=mask, other=0.0)
        total += grad.to(tl.float32) * x.to(tl.float32)
    result = tl.where(inside, tl.sum(total, axis=1), float("nan"))
    tl.store(grad_weights_ptr + slot, result, mask=slot < slots)
    tl.atomic_min(flag_ptr + tl.zeros([BLOCK_ROWS], tl.int64), slot, mask=(slot < slots) & (inside == 0))

"""``rms_norm`` in Triton, for CUDA and ROCm (and, interpreted, for CPU tensors).

A row of up to ``_WHOLE_ROW`` elements stays in registers: every input is read once. Wider rows are read twice, in
column blocks. The gradient of the weight is summed in two steps, per program over a fixed set of rows and then over the
programs in their order, so its bits depend on the shape alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m4ov_kernels.gpu import Build, Config, current_device
from m4ov_kernels.layout import NUMERICS, as_rows, output

_WHOLE_ROW = 8192  # 16 float32 values of each operand per thread with 16 warps; more does not fit in registers
_WIDE_BLOCK = 4096
_REDUCE = Config({"BLOCK_PARTIALS": 16, "BLOCK_D": 128}, num_warps=4)
_WEIGHT = Config({"BLOCK_ROWS": 4, "BLOCK_D": 1024}, num_warps=8)


@triton.jit
def _round(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def _scaled(x, rstd, weight, dtype: tl.constexpr, NUMERICS: tl.constexpr):
    """The normalised, weighted value in float32, rounded on the way where ``NUMERICS`` says so; 0 is hf."""
    if NUMERICS == 0:
        return _round(x * rstd, dtype) * weight
    else:
        return x * rstd * weight


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_fwd_kernel(
    hidden_ptr,  # [rows, width], row stride given
    hidden_stride,
    residual_ptr,  # likewise, or unused
    residual_stride,
    weight_ptr,  # [width]
    normed_ptr,  # [rows, width]
    total_ptr,  # [rows, width], or unused
    rstd_ptr,  # fp32 [rows]
    rows,
    width,
    eps,
    NUMERICS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype: tl.constexpr = normed_ptr.dtype.element_ty
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (col < width)[None, :]
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    x = tl.load(hidden_ptr + row[:, None] * hidden_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    place = row[:, None] * width + col[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + col[None, :], mask=mask, other=0.0)
        x += residual.to(tl.float32)
        tl.store(total_ptr + place, x.to(dtype), mask=mask)
        if NUMERICS != 2:
            x = _round(x, dtype)
    mean_square = tl.sum(x * x, axis=1) / tl.cast(width, tl.float32)
    rstd = tl.rsqrt(mean_square + tl.cast(eps, tl.float32))
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    normed = _scaled(x, rstd[:, None], weight[None, :], dtype, NUMERICS)
    tl.store(normed_ptr + place, normed.to(dtype), mask=mask)


@triton.jit
def _sum_at(hidden_ptr, residual_ptr, col, width, dtype: tl.constexpr, NUM: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    """``hidden + residual`` at these columns, unrounded, and as ``rms_norm`` normalises it."""
    x = tl.load(hidden_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    rounded = x
    if HAS_RESIDUAL and NUM != 2:
        rounded = _round(x, dtype)
    return x, rounded


@triton.jit
def _rms_norm_fwd_wide_kernel(
    hidden_ptr,
    hidden_stride,
    residual_ptr,
    residual_stride,
    weight_ptr,
    normed_ptr,
    total_ptr,
    rstd_ptr,
    width,
    eps,
    NUMERICS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row per program, in two passes over column blocks; arguments as in ``_rms_norm_fwd_kernel``."""
    dtype: tl.constexpr = normed_ptr.dtype.element_ty
    row = tl.cast(tl.program_id(0), tl.int64)
    hidden_ptr += row * hidden_stride
    residual_ptr += row * residual_stride
    normed_ptr += row * width
    total_ptr += row * width
    squares = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, width, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        total, x = _sum_at(hidden_ptr, residual_ptr, col, width, dtype, NUMERICS, HAS_RESIDUAL)
        squares += x * x
        if HAS_RESIDUAL:
            tl.store(total_ptr + col, total.to(dtype), mask=col < width)
    mean_square = tl.sum(squares, axis=0) / tl.cast(width, tl.float32)
    rstd = tl.rsqrt(mean_square + tl.cast(eps, tl.float32))
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, width, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        _, x = _sum_at(hidden_ptr, residual_ptr, col, width, dtype, NUMERICS, HAS_RESIDUAL)
        weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        tl.store(normed_ptr + col, _scaled(x, rstd, weight, dtype, NUMERICS).to(dtype), mask=col < width)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_bwd_kernel(
    grad_ptr,  # [rows, width], row stride given
    grad_stride,
    grad_total_ptr,  # likewise, or unused
    grad_total_stride,
    hidden_ptr,  # what was normalised, likewise
    hidden_stride,
    weight_ptr,  # [width]
    rstd_ptr,  # fp32 [rows]
    grad_hidden_ptr,  # [rows, width]
    partial_ptr,  # fp32 [programs, width], or unused
    rows,
    width,
    HAS_GRAD_TOTAL: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for block in range(program, tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & (col < width)[None, :]
        x = tl.load(hidden_ptr + row[:, None] * hidden_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        normed = x * rstd[:, None]
        if NEED_WEIGHT:
            grad_weight += grad * normed
        grad *= weight[None, :]
        mean = tl.sum(grad * normed, axis=1) / tl.cast(width, tl.float32)
        grad_hidden = (grad - normed * mean[:, None]) * rstd[:, None]
        if HAS_GRAD_TOTAL:
            place = row[:, None] * grad_total_stride + col[None, :]
            grad_hidden += tl.load(grad_total_ptr + place, mask=mask, other=0.0).to(tl.float32)
        place = row[:, None] * width + col[None, :]
        tl.store(grad_hidden_ptr + place, grad_hidden.to(grad_hidden_ptr.dtype.element_ty), mask=mask)
    if NEED_WEIGHT:
        partial = tl.sum(grad_weight, axis=0)
        tl.store(partial_ptr + tl.cast(program, tl.int64) * width + col, partial, mask=col < width)


@triton.jit
def _rms_norm_bwd_wide_kernel(
    grad_ptr,
    grad_stride,
    grad_total_ptr,
    grad_total_stride,
    hidden_ptr,
    hidden_stride,
    weight_ptr,
    rstd_ptr,
    grad_hidden_ptr,
    width,
    HAS_GRAD_TOTAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of one row per program, in two passes; arguments as in ``_rms_norm_bwd_kernel``."""
    row = tl.cast(tl.program_id(0), tl.int64)
    grad_ptr += row * grad_stride
    grad_total_ptr += row * grad_total_stride
    hidden_ptr += row * hidden_stride
    grad_hidden_ptr += row * width
    rstd = tl.load(rstd_ptr + row)
    products = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, width, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        x = tl.load(hidden_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        products += grad * weight * (x * rstd)
    mean = tl.sum(products, axis=0) / tl.cast(width, tl.float32)
    for start in range(0, width, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        x = tl.load(hidden_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        grad_hidden = (grad * weight - x * rstd * mean) * rstd
        if HAS_GRAD_TOTAL:
            grad_hidden += tl.load(grad_total_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        tl.store(grad_hidden_ptr + col, grad_hidden.to(grad_hidden_ptr.dtype.element_ty), mask=col < width)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_bwd_weight_kernel(
    grad_ptr,
    grad_stride,
    hidden_ptr,
    hidden_stride,
    rstd_ptr,
    partial_ptr,  # fp32 [programs of axis 0, width]
    rows,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The weight's partial gradients for wide rows: one block of columns, every n-th block of rows."""
    program = tl.program_id(0)
    col = tl.cast(tl.program_id(1), tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    grad_weight = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for block in range(program, tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & (col < width)[None, :]
        x = tl.load(hidden_ptr + row[:, None] * hidden_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        grad_weight += grad * (x * rstd[:, None])
    partial = tl.sum(grad_weight, axis=0)
    tl.store(partial_ptr + tl.cast(program, tl.int64) * width + col, partial, mask=col < width)


@triton.jit
def _rms_norm_bwd_reduce_kernel(
    partial_ptr,  # fp32 [count, width]
    grad_weight_ptr,  # [width]
    count,
    width,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    col = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_PARTIALS, BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_PARTIALS):
        index = start + tl.arange(0, BLOCK_PARTIALS)
        mask = (index < count)[:, None] & (col < width)[None, :]
        total += tl.load(partial_ptr + tl.cast(index, tl.int64)[:, None] * width + col[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=0).to(grad_weight_ptr.dtype.element_ty)
    tl.store(grad_weight_ptr + col, result, mask=col < width)


@lru_cache(maxsize=1024)
def _config(width: int) -> Config:
    """Blocks for rows of this width; by nothing else, so that a row's bits do not depend on how many there are."""
    if width > _WHOLE_ROW:
        return Config({"BLOCK_D": _WIDE_BLOCK}, num_warps=8)
    block = triton.next_power_of_2(width)
    rows = max(1, 1024 // block)
    return Config({"BLOCK_ROWS": rows, "BLOCK_D": block}, num_warps=max(4, block // 512))


def _programs(blocks: int, width: int) -> int:
    """How many partial weight gradients: at most 4 MiB of them for whole rows, enough to fill a large GPU."""
    most = max(256, min(1024, 2**20 // width)) if width <= _WHOLE_ROW else 64
    return max(1, min(blocks, most))


def rms_norm_fwd(
    hidden_states: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    numerics: str,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(normed, hidden_states + residual or an empty tensor, rstd fp32 [rows])``; ``out``: the three, contiguous, not
    overlapping an input."""
    shape, dtype = hidden_states.shape, hidden_states.dtype
    width = shape[-1]
    rows = hidden_states.numel() // width
    normed = output(out and out[0], shape, hidden_states, dtype)
    total = output(out and out[1], shape if residual is not None else (0,), hidden_states, dtype)
    rstd = output(out and out[2], (rows,), hidden_states, torch.float32)
    if rows == 0:
        return normed, total, rstd
    hidden_states, hidden_stride = as_rows(hidden_states)
    added, added_stride = as_rows(residual) if residual is not None else (hidden_states, hidden_stride)
    config = _config(width)
    operands: tuple[Any, ...] = (hidden_states, hidden_stride, added, added_stride, weight.contiguous(), normed)
    flags = {"NUMERICS": NUMERICS[numerics], "HAS_RESIDUAL": residual is not None, **config.options()}
    with current_device(hidden_states):
        if width > _WHOLE_ROW:
            _rms_norm_fwd_wide_kernel[(rows,)](*operands, total, rstd, width, eps, **flags)
        else:
            grid = (triton.cdiv(rows, config.constexprs["BLOCK_ROWS"]),)
            _rms_norm_fwd_kernel[grid](*operands, total, rstd, rows, width, eps, **flags)
    return normed, total, rstd


def rms_norm_bwd(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    hidden_states: Tensor,
    weight: Tensor,
    rstd: Tensor,
    numerics: str,
    need_weight: bool,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(grad_hidden_states, grad_weight or an empty tensor)``, gradients of the unrounded function, so ``numerics``
    makes no difference here. ``hidden_states``: what was normalised."""
    shape, dtype = hidden_states.shape, hidden_states.dtype
    width = shape[-1]
    rows = hidden_states.numel() // width
    grad_hidden = output(out and out[0], shape, hidden_states, dtype)
    grad_weight = output(out and out[1], (width,) if need_weight else (0,), weight, weight.dtype)
    hidden_states, hidden_stride = as_rows(hidden_states)
    grad_normed, grad_stride = as_rows(grad_normed)
    added, added_stride = as_rows(grad_total) if grad_total is not None else (hidden_states, hidden_stride)
    rstd = rstd.contiguous()
    config = _config(width)
    whole = width <= _WHOLE_ROW
    blocks = triton.cdiv(rows, (config if whole else _WEIGHT).constexprs["BLOCK_ROWS"])
    programs = _programs(blocks, width)
    partial = torch.empty((programs, width) if need_weight else (0,), dtype=torch.float32, device=weight.device)
    operands: tuple[Any, ...] = (grad_normed, grad_stride, added, added_stride, hidden_states, hidden_stride)
    operands += (weight.contiguous(), rstd, grad_hidden)
    with current_device(hidden_states):
        if whole and (rows or need_weight):
            flags = {"HAS_GRAD_TOTAL": grad_total is not None, "NEED_WEIGHT": need_weight, **config.options()}
            _rms_norm_bwd_kernel[(programs if need_weight else blocks,)](*operands, partial, rows, width, **flags)
        elif rows:
            flags = {"HAS_GRAD_TOTAL": grad_total is not None, **config.options()}
            _rms_norm_bwd_wide_kernel[(rows,)](*operands, width, **flags)
        if not whole and need_weight:
            grid = (programs, triton.cdiv(width, _WEIGHT.constexprs["BLOCK_D"]))
            inputs = (grad_normed, grad_stride, hidden_states, hidden_stride, rstd)
            _rms_norm_bwd_weight_kernel[grid](*inputs, partial, rows, width, **_WEIGHT.options())
        if need_weight:
            grid = (triton.cdiv(width, _REDUCE.constexprs["BLOCK_D"]), 1)
            _rms_norm_bwd_reduce_kernel[grid](partial, grad_weight, programs, width, **_REDUCE.options())
    return grad_hidden, grad_weight


def _declared() -> list[Build]:
    """Every kernel at the widths of models (head 128, hidden 1024 to 8192, wider) in the dtypes that are trained."""
    builds = []

    def declare(kernel: Any, dtype: str, signature: str, config: Config, note: str, **flags: Any) -> None:
        hot = "wide" not in kernel.__name__
        constexprs = {**flags, **config.constexprs}
        builds.append(Build(kernel, dtype, signature, constexprs, config.num_warps, hot=hot, note=note))

    rows_of = "*T/16 i32/16"
    fwd = f"{rows_of} {rows_of} *T/16 *T/16 *T/16 *fp32/16"
    bwd = f"{rows_of} {rows_of} {rows_of} *T/16 *fp32/16 *T/16"
    shipped = [("bf16", 128, (False,)), ("bf16", 1024, (True,)), ("bf16", 4096, (False, True)), ("bf16", 8192, (True,))]
    shipped += [("fp32", 1024, (True,)), ("fp16", 4096, (True,)), ("fp32", 8192, (True,))]
    for dtype, width, residuals in shipped:
        config = _config(width)
        for residual in residuals:
            note = f"D {width}" + ", residual" * residual
            flags = {"NUMERICS": 0, "HAS_RESIDUAL": residual}
            declare(_rms_norm_fwd_kernel, dtype, f"{fwd} i32 i32/16 fp32", config, note, **flags)
            flags = {"HAS_GRAD_TOTAL": residual, "NEED_WEIGHT": True}
            signature = f"{bwd} *fp32/16 i32 i32/16"
            declare(_rms_norm_bwd_kernel, dtype, signature, config, note, **flags)
    for numerics in ("vllm", "fp32"):
        flags = {"NUMERICS": NUMERICS[numerics], "HAS_RESIDUAL": True}
        signature = f"{fwd} i32 i32/16 fp32"
        declare(_rms_norm_fwd_kernel, "bf16", signature, _config(4096), f"D 4096, residual, {numerics}", **flags)
    wide = _config(_WHOLE_ROW + 1)
    for dtype in ("bf16", "fp32"):
        flags = {"NUMERICS": 0, "HAS_RESIDUAL": True}
        declare(_rms_norm_fwd_wide_kernel, dtype, f"{fwd} i32/16 fp32", wide, "wide", **flags)
        declare(_rms_norm_bwd_wide_kernel, dtype, f"{bwd} i32/16", wide, "wide", HAS_GRAD_TOTAL=True)
        signature = f"{rows_of} {rows_of} *fp32/16 *fp32/16 i32 i32/16"
        declare(_rms_norm_bwd_weight_kernel, dtype, signature, _WEIGHT, "wide")
        declare(_rms_norm_bwd_reduce_kernel, dtype, "*fp32/16 *T/16 i32 i32/16", _REDUCE, "")
    return builds


KERNELS = _declared()

"""``scatter_vision`` and ``deepstack_add`` in Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m4ov_kernels import configs, device_errors
from m4ov_kernels.gpu import SIZES, Build, Work, current_device
from m4ov_kernels.layout import as_rows, output

_TWICE = tl.constexpr(1 << 62)  # in `source`: a row that two features claim


@triton.jit(do_not_specialize=["rows", "count"])
def _feature_rows_index_kernel(
    positions_ptr,  # int64 [count]
    source_ptr,  # int64 [rows], filled with -1: becomes the feature of a row
    flag_ptr,  # int64 [1]
    rows,
    count,
    BLOCK: tl.constexpr,
):
    n = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(positions_ptr + n, mask=n < count, other=0)
    inside = (n < count) & (position >= 0) & (position < rows)
    before = tl.atomic_max(source_ptr + position, n, mask=inside)
    twice = inside & (before >= 0)
    tl.atomic_max(source_ptr + position, tl.full([BLOCK], _TWICE, tl.int64), mask=twice)
    # Of two features the second, whichever came here first.
    later = tl.where(twice & (before < _TWICE), tl.maximum(before, n), n)
    tl.atomic_min(flag_ptr + tl.zeros([BLOCK], tl.int64), later, mask=(n < count) & ((inside == 0) | twice))


@triton.jit
def _tile(rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows and columns of this program's tile."""
    program = tl.cast(tl.program_id(0), tl.int64)
    blocks = tl.cdiv(width, BLOCK_D)
    row = (program // blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    return row, col, (row < rows)[:, None] & (col < width)[None, :]


@triton.jit(do_not_specialize=["rows"])
def _feature_rows_fwd_kernel(
    base_ptr,  # [rows, width], row stride given
    base_stride,
    features_ptr,  # [count, width], likewise
    features_stride,
    source_ptr,  # int64 [rows]
    out_ptr,  # [rows, width]
    rows,
    width,
    ADD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, col, mask = _tile(rows, width, BLOCK_ROWS, BLOCK_D)
    n = tl.load(source_ptr + row, mask=row < rows, other=-1)
    twice = (n >= _TWICE)[:, None]
    taken = (n >= 0)[:, None]
    place = tl.where(n < _TWICE, n, 0)[:, None] * features_stride + col[None, :]
    feature = tl.load(features_ptr + place, mask=mask & taken & (twice == 0), other=0.0)
    here = base_ptr + row[:, None] * base_stride + col[None, :]
    if ADD:
        base = tl.load(here, mask=mask, other=0.0)
        total = (base.to(tl.float32) + feature.to(tl.float32)).to(base.dtype)
    else:
        base = tl.load(here, mask=mask & (taken == 0), other=0.0)
        total = feature
    result = tl.where(taken, total, base)
    nothing = tl.full([BLOCK_ROWS, BLOCK_D], float("nan"), tl.float32).to(result.dtype)
    tl.store(out_ptr + row[:, None] * width + col[None, :], tl.where(twice, nothing, result), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _feature_rows_clear_kernel(
    grad_ptr,  # [rows, width], row stride given
    grad_stride,
    source_ptr,  # int64 [rows]
    grad_base_ptr,  # [rows, width]
    rows,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of what features replaced: zero there, untouched elsewhere."""
    row, col, mask = _tile(rows, width, BLOCK_ROWS, BLOCK_D)
    free = tl.load(source_ptr + row, mask=row < rows, other=0) < 0
    grad = tl.load(grad_ptr + row[:, None] * grad_stride + col[None, :], mask=mask & free[:, None], other=0.0)
    tl.store(grad_base_ptr + row[:, None] * width + col[None, :], grad, mask=mask)


@triton.jit(do_not_specialize=["rows", "count"])
def _feature_rows_gather_kernel(
    grad_ptr,  # [rows, width], row stride given
    grad_stride,
    positions_ptr,  # int64 [count]
    grad_features_ptr,  # [count, width]
    rows,
    count,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n, col, mask = _tile(count, width, BLOCK_ROWS, BLOCK_D)
    position = tl.load(positions_ptr + n, mask=n < count, other=0)
    inside = ((position >= 0) & (position < rows))[:, None]
    grad = tl.load(grad_ptr + position[:, None] * grad_stride + col[None, :], mask=mask & inside, other=0.0)
    nothing = tl.full([BLOCK_ROWS, BLOCK_D], float("nan"), tl.float32).to(grad.dtype)
    tl.store(grad_features_ptr + n[:, None] * width + col[None, :], tl.where(inside, grad, nothing), mask=mask)


def _programs(rows: int, width: int, config: Any) -> tuple[int]:
    blocks = config.constexprs
    return (triton.cdiv(rows, blocks["BLOCK_ROWS"]) * triton.cdiv(width, blocks["BLOCK_D"]),)


def _source(operator: str, positions: Tensor, rows: int) -> Tensor:
    """Which feature each row takes; what is wrong with ``positions`` is recorded."""
    source = torch.full((rows,), -1, dtype=torch.int64, device=positions.device)
    count = positions.shape[0]
    if count:
        config = configs.get("feature_rows_index", source.new_empty(0, dtype=torch.float32))
        grid = (triton.cdiv(count, config.constexprs["BLOCK"]),)
        flag = device_errors.flag(positions.device, operator)
        with current_device(positions):
            _feature_rows_index_kernel[grid](positions, source, flag, rows, count, **config.options())
    return source


def _forward(operator: str, base: Tensor, features: Tensor, positions: Tensor, out: Tensor | None, add: bool) -> Tensor:
    result = output(out, base.shape, base, base.dtype)
    rows, width = base.shape[:-1].numel(), base.shape[-1]
    source = _source(operator, positions.contiguous(), rows)
    if result.numel():
        config = configs.get("feature_rows_fwd", base, width)
        with current_device(base):
            _feature_rows_fwd_kernel[_programs(rows, width, config)](
                *as_rows(base), *as_rows(features), source, result, rows, width, ADD=add, **config.options()
            )
    return result


def scatter_vision_fwd(
    inputs_embeds: Tensor, features: Tensor, positions: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """``inputs_embeds`` with ``features`` in the rows ``positions``; ``out``: contiguous, none of the inputs."""
    return _forward("scatter_vision", inputs_embeds, features, positions, out, add=False)


def deepstack_add_fwd(
    hidden_states: Tensor, features: Tensor, positions: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """``hidden_states`` with ``features`` added to the rows ``positions``; ``out``: contiguous, none of the inputs."""
    return _forward("deepstack_add", hidden_states, features, positions, out, add=True)


def scatter_vision_bwd(
    grad_output: Tensor,
    positions: Tensor,
    need_inputs_embeds: bool,
    need_features: bool,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(grad_inputs_embeds, grad_features)``; what is not needed is empty."""
    given, width = out or (None, None), grad_output.shape[-1]
    shape = grad_output.shape if need_inputs_embeds else (0,)
    grad_inputs = output(given[0], shape, grad_output, grad_output.dtype)
    if grad_inputs.numel():
        rows = grad_output.shape[:-1].numel()
        source = _source("scatter_vision", positions.contiguous(), rows)
        config = configs.get("feature_rows_clear", grad_output, width)
        with current_device(grad_output):
            _feature_rows_clear_kernel[_programs(rows, width, config)](
                *as_rows(grad_output), source, grad_inputs, rows, width, **config.options()
            )
    if need_features:
        return grad_inputs, deepstack_add_bwd(grad_output, positions, out=given[1])
    return grad_inputs, output(given[1], (0,), grad_output, grad_output.dtype)


def deepstack_add_bwd(grad_output: Tensor, positions: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The gradient of ``features``; that of ``hidden_states`` is ``grad_output``."""
    rows, count, width = grad_output.shape[:-1].numel(), positions.shape[0], grad_output.shape[-1]
    result = output(out, (count, width), grad_output, grad_output.dtype)
    if result.numel():
        config = configs.get("feature_rows_gather", grad_output, width)
        with current_device(grad_output):
            _feature_rows_gather_kernel[_programs(count, width, config)](
                *as_rows(grad_output), positions.contiguous(), result, rows, count, width, **config.options()
            )
    return result


_ROWS, _COUNT = 8192, 6144  # the problem of the cost model: three quarters of the rows are vision


def _work(dtype: str, width: int, rows_moved: int, indices: int, operations: int) -> Work:
    moved = rows_moved * width * SIZES[dtype] + 8 * indices
    return Work(f"[{_ROWS}, {width}], {_COUNT} features", moved, operations)


def _declared() -> list[Build]:
    builds = []

    def declare(kernel: Any, dtype: str, signature: str, row: configs.Row, **rest: Any) -> None:
        config, flags = row.config, rest.pop("flags", {})
        constexprs = {**flags, **config.constexprs}
        builds.append(Build(kernel, dtype, signature, constexprs, config.num_warps, config.num_stages, **rest))

    rows_of = "*T/16 i32/16"
    for row, targets in configs.shipped("feature_rows_index", "fp32"):  # its dtype is int64 only
        work = Work(f"{_COUNT} features", 16 * _COUNT, 3 * _COUNT)
        signature = "*i64/16 *i64/16 *i64/16 i32 i32"
        declare(_feature_rows_index_kernel, "fp32", signature, row, work=work, targets=targets)
    for dtype in SIZES:
        for row, targets in configs.shipped("feature_rows_fwd", dtype):
            width = row.width or 4096
            for add in (False, True):
                work = _work(dtype, width, 2 * _ROWS + add * _COUNT, _ROWS, add * _COUNT * width)
                note, flags = f"D {width}" + ", add" * add, {"ADD": add}
                signature = f"{rows_of} {rows_of} *i64/16 *T/16 i32 i32/16"
                rest = {"flags": flags, "note": note, "work": work, "targets": targets}
                declare(_feature_rows_fwd_kernel, dtype, signature, row, **rest)
        for row, targets in configs.shipped("feature_rows_clear", dtype):
            width = row.width or 4096
            work = _work(dtype, width, 2 * _ROWS - _COUNT, _ROWS, 0)
            signature = f"{rows_of} *i64/16 *T/16 i32 i32/16"
            rest = {"note": f"D {width}", "work": work, "targets": targets}
            declare(_feature_rows_clear_kernel, dtype, signature, row, **rest)
        for row, targets in configs.shipped("feature_rows_gather", dtype):
            width = row.width or 4096
            work = _work(dtype, width, 2 * _COUNT, _COUNT, 0)
            signature = f"{rows_of} *i64/16 *T/16 i32 i32 i32/16"
            rest = {"note": f"D {width}", "work": work, "targets": targets}
            declare(_feature_rows_gather_kernel, dtype, signature, row, **rest)
    return builds


KERNELS = _declared()

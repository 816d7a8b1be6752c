"""``layer_norm`` in Triton: launches and declarations, as ``triton.py`` has them for ``rms_norm``."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from m4ov_kernels import configs
from m4ov_kernels.gpu import SIZES, Build, Work, current_device
from m4ov_kernels.layout import NUMERICS, as_rows, output, vector
from m4ov_kernels.norm.triton_kernels import _rms_norm_bwd_reduce_kernel
from m4ov_kernels.norm.triton_layer_norm_kernels import (
    _layer_norm_bwd_kernel,
    _layer_norm_bwd_parameters_kernel,
    _layer_norm_bwd_wide_kernel,
    _layer_norm_fwd_kernel,
    _layer_norm_fwd_wide_kernel,
)
from m4ov_kernels.norm.triton_rows import programs_for, whole_row


def layer_norm_fwd(
    hidden_states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    numerics: str,
    *,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(normed, hidden_states + residual or an empty tensor, mean, rstd)``, the last two fp32 ``[rows]``; ``out``: the
    four, contiguous, not overlapping an input."""
    shape, dtype = hidden_states.shape, hidden_states.dtype
    width = shape[-1]
    rows = hidden_states.numel() // width
    normed = output(out and out[0], shape, hidden_states, dtype)
    total = output(out and out[1], shape if residual is not None else (0,), hidden_states, dtype)
    mean, rstd = (output(out and out[i], (rows,), hidden_states, torch.float32) for i in (2, 3))
    if rows == 0:
        return normed, total, mean, rstd
    hidden_states, hidden_stride = as_rows(hidden_states)
    added, added_stride = as_rows(residual) if residual is not None else (hidden_states, hidden_stride)
    operands: tuple[Any, ...] = (hidden_states, hidden_stride, added, added_stride)
    operands += (vector(weight, hidden_states, 1.0), vector(bias, hidden_states, -0.0), normed, total, mean, rstd)
    flags = {"NUMERICS": NUMERICS[numerics], "HAS_RESIDUAL": residual is not None}
    whole = whole_row("layer_norm_fwd", hidden_states, width)
    with current_device(hidden_states):
        if whole:
            grid = (triton.cdiv(rows, whole.constexprs["BLOCK_ROWS"]),)
            _layer_norm_fwd_kernel[grid](*operands, rows, width, eps, **flags, **whole.options())
        else:
            flags.update(configs.get("layer_norm_fwd_wide", hidden_states).options())
            _layer_norm_fwd_wide_kernel[(rows,)](*operands, width, eps, **flags)
    return normed, total, mean, rstd


def layer_norm_bwd(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    hidden_states: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_weight: bool,
    need_bias: bool,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad_hidden_states, grad_weight, grad_bias)``, the last two empty unless they are needed."""
    shape, dtype = hidden_states.shape, hidden_states.dtype
    width = shape[-1]
    rows = hidden_states.numel() // width
    grad_hidden = output(out and out[0], shape, hidden_states, dtype)
    grad_weight = output(out and out[1], (width,) if need_weight else (0,), hidden_states, dtype)
    grad_bias = output(out and out[2], (width,) if need_bias else (0,), hidden_states, dtype)
    hidden_states, hidden_stride = as_rows(hidden_states)
    grad_normed, grad_stride = as_rows(grad_normed)
    added, added_stride = as_rows(grad_total) if grad_total is not None else (hidden_states, hidden_stride)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    whole = whole_row("layer_norm_bwd", hidden_states, width)
    by_column = whole or configs.get("layer_norm_bwd_parameters", hidden_states)
    blocks = triton.cdiv(rows, by_column.constexprs["BLOCK_ROWS"])
    programs, needed = programs_for(blocks, width, whole is not None), need_weight or need_bias
    partial = torch.empty((2, programs, width) if needed else (0,), dtype=torch.float32, device=rstd.device)
    operands: tuple[Any, ...] = (grad_normed, grad_stride, added, added_stride, hidden_states, hidden_stride)
    operands += (vector(weight, hidden_states, 1.0), mean, rstd, grad_hidden)
    has_total = {"HAS_GRAD_TOTAL": grad_total is not None}
    with current_device(hidden_states):
        if whole and (rows or needed):
            flags = {**has_total, "NEED_PARAMETERS": needed, **whole.options()}
            _layer_norm_bwd_kernel[(programs if needed else blocks,)](*operands, partial, rows, width, **flags)
        elif rows:
            options = configs.get("layer_norm_bwd_wide", hidden_states).options()
            _layer_norm_bwd_wide_kernel[(rows,)](*operands, width, **has_total, **options)
        if not whole and needed:
            grid = (programs, triton.cdiv(width, by_column.constexprs["BLOCK_D"]))
            inputs = (grad_normed, grad_stride, hidden_states, hidden_stride, mean, rstd)
            _layer_norm_bwd_parameters_kernel[grid](*inputs, partial, rows, width, **by_column.options())
        reduce = configs.get("rms_norm_bwd_reduce", hidden_states)
        grid = (triton.cdiv(width, reduce.constexprs["BLOCK_D"]), 1)
        for place, (need, target) in enumerate(((need_weight, grad_weight), (need_bias, grad_bias))):
            if need:
                _rms_norm_bwd_reduce_kernel[grid](partial[place], target, programs, width, **reduce.options())
    return grad_hidden, grad_weight, grad_bias


_ROWS = 4096  # of the problems that the cost models state
_WIDE = 16384


def _forward_work(width: int, dtype: str, residual: bool) -> Work:
    """Reads hidden_states (and the residual), weight and bias, writes normed (and the sum), mean and rstd."""
    count = _ROWS * width
    moved = (count * (4 if residual else 2) + 2 * width) * SIZES[dtype] + 8 * _ROWS
    return Work(f"[{_ROWS}, {width}]", moved, count * (8 + residual))


def _backward_work(width: int, dtype: str, residual: bool, needed: bool) -> Work:
    """Reads grad_normed, hidden_states (and the sum's gradient), weight, mean and rstd, writes grad_hidden and, in
    float32, at least one partial gradient of weight and bias."""
    count = _ROWS * width
    moved = (count * (4 if residual else 3) + width) * SIZES[dtype] + 8 * _ROWS + 8 * width * needed
    return Work(f"[{_ROWS}, {width}]", moved, count * (11 + residual + 3 * needed))


def _declared() -> list[Build]:
    """Every row of the tables for every dtype, with a residual; what else a call may ask for at some of them."""
    builds: list[Build] = []

    def declare(kernel: Any, dtype: str, signature: str, row: Any, targets: tuple[str, ...], **rest: Any) -> None:
        config, flags = row.config, rest.pop("flags", {})
        constexprs = {**flags, **config.constexprs}
        builds.append(
            Build(kernel, dtype, signature, constexprs, config.num_warps, config.num_stages, targets=targets, **rest)
        )

    rows_of = "*T/16 i32/16"
    fwd = f"{rows_of} {rows_of} *T/16 *T/16 *T/16 *T/16 *fp32/16 *fp32/16"
    bwd = f"{rows_of} {rows_of} {rows_of} *T/16 *fp32/16 *fp32/16 *T/16"
    for dtype in SIZES:
        for row, targets in configs.shipped("layer_norm_fwd", dtype):
            width = row.width or 0
            variants = [(True, "hf")]
            if dtype == "bf16" and width in (2048, 4096):
                variants += [(False, "hf"), (True, "fp32")]
            for residual, numerics in variants:
                note = f"D {width}" + ", residual" * residual + f", {numerics}" * (numerics != "hf")
                flags = {"NUMERICS": NUMERICS[numerics], "HAS_RESIDUAL": residual}
                rest = {"flags": flags, "note": note, "work": _forward_work(width, dtype, residual)}
                declare(_layer_norm_fwd_kernel, dtype, f"{fwd} i32 i32/16 fp32", row, targets, **rest)
        for row, targets in configs.shipped("layer_norm_bwd", dtype):
            width = row.width or 0
            needs = [(True, True)]
            if dtype == "bf16" and width in (2048, 4096):
                needs += [(False, True), (True, False)]
            for residual, needed in needs:
                note = f"D {width}" + ", residual" * residual + ", frozen" * (not needed)
                switches = {"HAS_GRAD_TOTAL": residual, "NEED_PARAMETERS": needed}
                rest = {"flags": switches, "note": note, "work": _backward_work(width, dtype, residual, needed)}
                declare(_layer_norm_bwd_kernel, dtype, f"{bwd} *fp32/16 i32 i32/16", row, targets, **rest)
        for row, targets in configs.shipped("layer_norm_fwd_wide", dtype):
            flags = {"NUMERICS": 0, "HAS_RESIDUAL": True}
            rest = {"hot": False, "work": _forward_work(_WIDE, dtype, True), "note": "wide", "flags": flags}
            declare(_layer_norm_fwd_wide_kernel, dtype, f"{fwd} i32/16 fp32", row, targets, **rest)
        for row, targets in configs.shipped("layer_norm_bwd_wide", dtype):
            flags = {"HAS_GRAD_TOTAL": True}
            rest = {"hot": False, "work": _backward_work(_WIDE, dtype, True, False), "note": "wide", "flags": flags}
            declare(_layer_norm_bwd_wide_kernel, dtype, f"{bwd} i32/16", row, targets, **rest)
        for row, targets in configs.shipped("layer_norm_bwd_parameters", dtype):
            count = _ROWS * _WIDE
            moved = 2 * count * SIZES[dtype] + 8 * _ROWS + 8 * programs_for(_ROWS, _WIDE, False) * _WIDE
            rest = {"note": "wide", "work": Work(f"[{_ROWS}, {_WIDE}]", moved, 5 * count)}
            signature = f"{rows_of} {rows_of} *fp32/16 *fp32/16 *fp32/16 i32 i32/16"
            declare(_layer_norm_bwd_parameters_kernel, dtype, signature, row, targets, **rest)
    return builds


KERNELS = _declared()

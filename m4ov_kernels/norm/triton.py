"""The norms in Triton, for CUDA and ROCm (and, interpreted, for CPU tensors): launches and declarations. Those of
``layer_norm`` stand in ``triton_layer_norm.py``.

The kernels are in ``triton_kernels.py``, their configurations in :mod:`m4ov_kernels.configs`, by dtype and width alone,
so that a row's bits do not depend on how many there are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from m4ov_kernels import configs
from m4ov_kernels.gpu import SIZES, Build, CudaBuild, Work, current_device
from m4ov_kernels.layout import NUMERICS, as_rows, output
from m4ov_kernels.norm.triton_kernels import (
    _rms_norm_bwd_kernel,
    _rms_norm_bwd_reduce_kernel,
    _rms_norm_bwd_weight_kernel,
    _rms_norm_bwd_wide_kernel,
    _rms_norm_fwd_kernel,
    _rms_norm_fwd_wide_kernel,
)
from m4ov_kernels.norm.triton_layer_norm import KERNELS as _LAYER_NORM
from m4ov_kernels.norm.triton_layer_norm import layer_norm_bwd, layer_norm_fwd
from m4ov_kernels.norm.triton_rows import programs_for, whole_row

__all__ = ["KERNELS", "layer_norm_bwd", "layer_norm_fwd", "rms_norm_bwd", "rms_norm_fwd"]


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
    operands: tuple[Any, ...] = (hidden_states, hidden_stride, added, added_stride, weight.contiguous(), normed)
    flags = {"NUMERICS": NUMERICS[numerics], "HAS_RESIDUAL": residual is not None}
    whole = whole_row("rms_norm_fwd", hidden_states, width)
    with current_device(hidden_states):
        if whole:
            grid = (triton.cdiv(rows, whole.constexprs["BLOCK_ROWS"]),)
            _rms_norm_fwd_kernel[grid](*operands, total, rstd, rows, width, eps, **flags, **whole.options())
        else:
            flags.update(configs.get("rms_norm_fwd_wide", hidden_states).options())
            _rms_norm_fwd_wide_kernel[(rows,)](*operands, total, rstd, width, eps, **flags)
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
    whole = whole_row("rms_norm_bwd", hidden_states, width)
    by_weight = whole or configs.get("rms_norm_bwd_weight", hidden_states)
    blocks = triton.cdiv(rows, by_weight.constexprs["BLOCK_ROWS"])
    programs = programs_for(blocks, width, whole is not None)
    partial = torch.empty((programs, width) if need_weight else (0,), dtype=torch.float32, device=weight.device)
    operands: tuple[Any, ...] = (grad_normed, grad_stride, added, added_stride, hidden_states, hidden_stride)
    operands += (weight.contiguous(), rstd, grad_hidden)
    with current_device(hidden_states):
        if whole and (rows or need_weight):
            flags = {"HAS_GRAD_TOTAL": grad_total is not None, "NEED_WEIGHT": need_weight, **whole.options()}
            _rms_norm_bwd_kernel[(programs if need_weight else blocks,)](*operands, partial, rows, width, **flags)
        elif rows:
            wide = configs.get("rms_norm_bwd_wide", hidden_states)
            flags = {"HAS_GRAD_TOTAL": grad_total is not None, **wide.options()}
            _rms_norm_bwd_wide_kernel[(rows,)](*operands, width, **flags)
        if not whole and need_weight:
            grid = (programs, triton.cdiv(width, by_weight.constexprs["BLOCK_D"]))
            inputs = (grad_normed, grad_stride, hidden_states, hidden_stride, rstd)
            _rms_norm_bwd_weight_kernel[grid](*inputs, partial, rows, width, **by_weight.options())
        if need_weight:
            reduce = configs.get("rms_norm_bwd_reduce", weight)
            grid = (triton.cdiv(width, reduce.constexprs["BLOCK_D"]), 1)
            _rms_norm_bwd_reduce_kernel[grid](partial, grad_weight, programs, width, **reduce.options())
    return grad_hidden, grad_weight


_ROWS = 4096  # of the problems that the cost models state
_WIDE = 16384


def _forward_work(width: int, dtype: str, residual: bool) -> Work:
    """Reads hidden_states (and the residual) and weight, writes normed (and the sum) and rstd."""
    count = _ROWS * width
    moved = (count * (4 if residual else 2) + width) * SIZES[dtype] + 4 * _ROWS
    return Work(f"[{_ROWS}, {width}]", moved, count * (5 if residual else 4))


def _backward_work(width: int, dtype: str, residual: bool, need_weight: bool) -> Work:
    """Reads grad_normed, hidden_states (and the sum's gradient), weight and rstd, writes grad_hidden and, in float32,
    at least one partial gradient of the weight: how many, a configuration says, and a floor does not depend on it."""
    count = _ROWS * width
    moved = (count * (4 if residual else 3) + width) * SIZES[dtype] + 4 * _ROWS + 4 * width * need_weight
    return Work(f"[{_ROWS}, {width}]", moved, count * (8 + residual + 2 * need_weight))


def _reduce_work(width: int, dtype: str) -> Work:
    programs = programs_for(_ROWS, width, True)
    return Work(f"[{programs}, {width}] partials", 4 * programs * width + width * SIZES[dtype], programs * width)


def _declared() -> list[Build | CudaBuild]:
    """Every row of the tables for every dtype, with a residual; what else a call may ask for at some of them."""
    builds: list[Build | CudaBuild] = []

    def declare(
        kernel: Any, dtype: str, signature: str, row: configs.Row, targets: tuple[str, ...], **rest: Any
    ) -> None:
        config, flags = row.config, rest.pop("flags", {})
        constexprs = {**flags, **config.constexprs}
        builds.append(
            Build(kernel, dtype, signature, constexprs, config.num_warps, config.num_stages, targets=targets, **rest)
        )

    rows_of = "*T/16 i32/16"
    fwd = f"{rows_of} {rows_of} *T/16 *T/16 *T/16 *fp32/16"
    bwd = f"{rows_of} {rows_of} {rows_of} *T/16 *fp32/16 *T/16"
    for dtype in SIZES:
        for row, targets in configs.shipped("rms_norm_fwd", dtype):
            width = row.width or 0
            variants = [(True, "hf")]
            if dtype == "bf16" and width in (128, 4096):
                variants += [(False, "hf"), (True, "vllm"), (True, "fp32")]
            for residual, numerics in variants:
                note = f"D {width}" + ", residual" * residual + f", {numerics}" * (numerics != "hf")
                flags = {"NUMERICS": NUMERICS[numerics], "HAS_RESIDUAL": residual}
                work = _forward_work(width, dtype, residual)
                signature = f"{fwd} i32 i32/16 fp32"
                declare(_rms_norm_fwd_kernel, dtype, signature, row, targets, flags=flags, note=note, work=work)
        for row, targets in configs.shipped("rms_norm_bwd", dtype):
            width = row.width or 0
            needs = [(True, True)]
            if dtype == "bf16" and width in (128, 4096):
                needs += [(False, True), (True, False)]
            for residual, need_weight in needs:
                note = f"D {width}" + ", residual" * residual + ", frozen weight" * (not need_weight)
                switches = {"HAS_GRAD_TOTAL": residual, "NEED_WEIGHT": need_weight}
                work = _backward_work(width, dtype, residual, need_weight)
                signature = f"{bwd} *fp32/16 i32 i32/16"
                declare(_rms_norm_bwd_kernel, dtype, signature, row, targets, flags=switches, note=note, work=work)
        for row, targets in configs.shipped("rms_norm_fwd_wide", dtype):
            flags = {"NUMERICS": 0, "HAS_RESIDUAL": True}
            rest = {"hot": False, "work": _forward_work(_WIDE, dtype, True), "note": "wide", "flags": flags}
            declare(_rms_norm_fwd_wide_kernel, dtype, f"{fwd} i32/16 fp32", row, targets, **rest)
        for row, targets in configs.shipped("rms_norm_bwd_wide", dtype):
            flags = {"HAS_GRAD_TOTAL": True}
            rest = {"hot": False, "work": _backward_work(_WIDE, dtype, True, False), "note": "wide", "flags": flags}
            declare(_rms_norm_bwd_wide_kernel, dtype, f"{bwd} i32/16", row, targets, **rest)
        for row, targets in configs.shipped("rms_norm_bwd_weight", dtype):
            count = _ROWS * _WIDE
            moved = 2 * count * SIZES[dtype] + 4 * _ROWS + 4 * programs_for(_ROWS, _WIDE, False) * _WIDE
            work = Work(f"[{_ROWS}, {_WIDE}]", moved, 3 * count)
            signature = f"{rows_of} {rows_of} *fp32/16 *fp32/16 i32 i32/16"
            declare(_rms_norm_bwd_weight_kernel, dtype, signature, row, targets, note="wide", work=work)
        for row, targets in configs.shipped("rms_norm_bwd_reduce", dtype):
            work = _reduce_work(4096, dtype)
            signature = "*fp32/16 *T/16 i32 i32/16"
            declare(_rms_norm_bwd_reduce_kernel, dtype, signature, row, targets, work=work)
    for dtype, name in (("bf16", "__nv_bfloat16"), ("fp16", "__half"), ("fp32", "float")):
        # The residual's presence is an argument there, so the model is of the smaller call.
        builds.append(CudaBuild(f"rms_norm_fwd_kernel<{name}, *>", dtype, work=_forward_work(4096, dtype, False)))
        work = _backward_work(4096, dtype, False, True)
        builds.append(CudaBuild(f"rms_norm_bwd_kernel<{name}, *>", dtype, work=work))
        builds.append(CudaBuild(f"rms_norm_bwd_reduce_kernel<{name}>", dtype, work=_reduce_work(4096, dtype)))
    return builds


KERNELS = [*_declared(), *_LAYER_NORM]

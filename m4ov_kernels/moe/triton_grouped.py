"""``grouped_linear`` in Triton."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from m4ov_kernels import configs, device_errors
from m4ov_kernels.gpu import SIZES, Build, Work, current_device
from m4ov_kernels.layout import as_rows, output
from m4ov_kernels.moe.triton_grouped_kernels import _grouped_linear_kernel, _grouped_linear_weight_kernel


def grouped_linear_fwd(rows: Tensor, weight: Tensor, offsets: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``[S, N]``."""
    result = output(out, (rows.shape[0], weight.shape[1]), rows, rows.dtype)
    _multiply(result, rows, weight, offsets)
    return result


def grouped_linear_bwd(
    grad_output: Tensor,
    rows: Tensor,
    weight: Tensor,
    offsets: Tensor,
    need_rows: bool,
    need_weight: bool,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(grad_rows, grad_weight)``; what is not needed is empty."""
    given = out or (None, None)
    grad_rows = output(given[0], rows.shape if need_rows else (0,), rows, rows.dtype)
    grad_weight = output(given[1], weight.shape if need_weight else (0,), rows, rows.dtype)
    if need_rows:
        _multiply(grad_rows, grad_output, weight.mT, offsets)
    if need_weight:
        experts, columns, width = weight.shape
        config = configs.get("grouped_linear_weight", rows)
        blocks = config.constexprs
        grid = (experts * triton.cdiv(columns, blocks["BLOCK_M"]) * triton.cdiv(width, blocks["BLOCK_N"]),)
        operands = (*as_rows(grad_output), *as_rows(rows), *_common(offsets, grad_weight))
        sizes = (rows.shape[0], columns, width, experts)
        with current_device(rows):
            _grouped_linear_weight_kernel[grid](
                *operands, *sizes, EXPERTS=triton.next_power_of_2(experts), **config.options()
            )
    return grad_rows, grad_weight


def _common(offsets: Tensor, result: Tensor) -> tuple[Tensor, ...]:
    return offsets.to(torch.int32).contiguous(), result, device_errors.flag(result.device, "grouped_linear")


def _multiply(result: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor) -> None:
    """``weight``: ``[E, N, K]``, of which rows or columns are dense, or a copy is made."""
    experts, columns, width = weight.shape
    if not result.numel():
        return
    if weight.stride(2) != 1 and weight.stride(1) != 1:
        weight = weight.contiguous()
    across = weight.stride(2) != 1
    config = configs.get("grouped_linear", rows)
    blocks = config.constexprs
    tiles = triton.cdiv(rows.shape[0], blocks["BLOCK_M"]) + experts
    strides = (weight.stride(2) if across else weight.stride(1), weight.stride(0))
    operands = (*as_rows(rows), weight, *strides, *_common(offsets, result))
    sizes = (rows.shape[0], columns, width, experts)
    with current_device(rows):
        _grouped_linear_kernel[(tiles * triton.cdiv(columns, blocks["BLOCK_N"]),)](
            *operands, *sizes, ACROSS=across, EXPERTS=triton.next_power_of_2(experts), **config.options()
        )


_ROWS, _EXPERTS, _COLUMNS, _WIDTH = 65536, 128, 1536, 2048  # the problem of the cost model


def _declared() -> list[Build]:
    """AMD's matrix units have float32's precision; NVIDIA's have not, so there float32 takes no matrix units."""
    builds = []
    moved = _ROWS * (_COLUMNS + _WIDTH) + _EXPERTS * _COLUMNS * _WIDTH
    flops = 2 * _ROWS * _COLUMNS * _WIDTH
    problem = f"{_ROWS} rows, {_EXPERTS} experts, {_WIDTH} → {_COLUMNS}"
    tensors = "*i32/16 *T/16 *i64/16 i32 i32/16 i32/16 i32/16"
    kernels = (
        ("grouped_linear", _grouped_linear_kernel, f"*T/16 i32/16 *T/16 i32/16 i32/16 {tensors}", (False, True)),
        ("grouped_linear_weight", _grouped_linear_weight_kernel, f"*T/16 i32/16 *T/16 i32/16 {tensors}", (None,)),
    )
    for dtype in SIZES:
        work = Work(problem, moved * SIZES[dtype], flops)
        for table, kernel, signature, layouts in kernels:
            for row, targets in configs.shipped(table, dtype):
                nvidia = tuple(target for target in targets if target.startswith("sm"))
                others = tuple(target for target in targets if not target.startswith("sm"))
                parts = [(nvidia, False, ""), (others, True, "mfma")] if dtype == "fp32" else [(targets, True, "")]
                for across in layouts:
                    for some, matrix, title in parts:
                        flags = {} if across is None else {"ACROSS": across}
                        build = Build(
                            kernel,
                            dtype,
                            signature,
                            {**flags, "EXPERTS": _EXPERTS, **row.config.constexprs},
                            row.config.num_warps,
                            row.config.num_stages,
                            note=", ".join(part for part in ("across" * (across is True), title) if part),
                            work=work,
                            matrix=matrix,
                            targets=some,
                        )
                        builds.append(build)
    return builds


KERNELS = _declared()

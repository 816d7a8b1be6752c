"""``permute`` and ``unpermute`` in Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from m4ov_kernels import configs, device_errors
from m4ov_kernels.gpu import SIZES, Build, Work, current_device
from m4ov_kernels.layout import as_rows, output
from m4ov_kernels.moe.triton_rows_kernels import (
    _permute_fwd_kernel,
    _unpermute_fwd_kernel,
    _unpermute_rows_bwd_kernel,
    _unpermute_weights_bwd_kernel,
)


def _programs(rows: int, width: int, config: Any) -> tuple[int]:
    blocks = config.constexprs
    return (triton.cdiv(rows, blocks["BLOCK_ROWS"]) * triton.cdiv(width, blocks["BLOCK_D"]),)


def permute_fwd(
    hidden_states: Tensor, experts: Tensor, num_experts: int, *, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(rows, order, offsets)``: slots in the order of a stable sort, on the device; rows gathered by it."""
    (tokens, width), top_k = hidden_states.shape, experts.shape[1]
    given, slots_count = out or (None, None, None), tokens * top_k
    rows = output(given[0], (slots_count, width), hidden_states, hidden_states.dtype)
    order = output(given[1], (tokens, top_k), hidden_states, torch.int32)
    offsets = output(given[2], (num_experts + 1,), hidden_states, torch.int32)
    flat = experts.flatten()
    # What has no expert goes behind all that have one.
    keys, slots = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts).sort(stable=True)
    order.view(-1).scatter_(0, slots, torch.arange(slots_count, dtype=torch.int32, device=slots.device))
    bounds = torch.arange(num_experts + 1, dtype=keys.dtype, device=keys.device)
    offsets.copy_(torch.searchsorted(keys, bounds, out_int32=True))
    if rows.numel():
        config = configs.get("permute_fwd", hidden_states, width)
        flag = device_errors.flag(rows.device, "permute")
        hidden_states, stride = as_rows(hidden_states)
        valid = torch.searchsorted(keys, bounds[-1:], out_int32=True)
        operands = (hidden_states, stride, slots, valid, rows, flag, slots_count, width, top_k)
        with current_device(rows):
            _permute_fwd_kernel[_programs(slots_count, width, config)](*operands, **config.options())
    return rows, order, offsets


def permute_bwd(grad_rows: Tensor, order: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The gradient of ``hidden_states``."""
    return unpermute_fwd(grad_rows, order, None, out=out)


def unpermute_fwd(rows: Tensor, order: Tensor, weights: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """The weighted sums of the rows of each token."""
    (tokens, top_k), width = order.shape, rows.shape[1]
    result = output(out, (tokens, width), rows, rows.dtype)
    if result.numel():
        config = configs.get("unpermute_fwd", rows, width)
        flag = device_errors.flag(rows.device, "unpermute")
        vector = rows if weights is None else weights.contiguous()
        rows, stride = as_rows(rows)
        operands = (rows, stride, order.contiguous(), vector, result, flag, tokens, width, top_k)
        with current_device(rows):
            _unpermute_fwd_kernel[_programs(tokens, width, config)](
                *operands, HAS_WEIGHTS=weights is not None, **config.options()
            )
    return result


def unpermute_bwd(
    grad_output: Tensor,
    rows: Tensor | None,
    order: Tensor,
    weights: Tensor | None,
    need_rows: bool,
    need_weights: bool,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(grad_rows, grad_weights)``; what is not needed is empty."""
    (tokens, top_k), width = order.shape, grad_output.shape[1]
    given, count = out or (None, None), tokens * top_k
    grad_rows = output(given[0], (count, width) if need_rows else (0,), grad_output, grad_output.dtype)
    grad_weights = output(given[1], (tokens, top_k) if need_weights else (0,), grad_output, torch.float32)
    if not count:
        return grad_rows, grad_weights
    slots, order = _inverse(order), order.contiguous()
    vector = grad_output if weights is None else weights.contiguous()
    grad_output, grad_stride = as_rows(grad_output)
    with current_device(grad_output):
        if need_rows:
            config = configs.get("unpermute_bwd", grad_output, width)
            operands = (grad_output, grad_stride, slots, vector, grad_rows, count, width, top_k)
            _unpermute_rows_bwd_kernel[_programs(count, width, config)](
                *operands, HAS_WEIGHTS=weights is not None, **config.options()
            )
        if need_weights:
            if rows is None:
                raise ValueError("unpermute_bwd: rows must be given for the gradient of weights")
            config = configs.get("unpermute_weights", grad_output, width)
            flag = device_errors.flag(grad_output.device, "unpermute")
            both = (grad_output, grad_stride, *as_rows(rows))
            grid = (triton.cdiv(count, config.constexprs["BLOCK_ROWS"]),)
            _unpermute_weights_bwd_kernel[grid](
                *both, order, slots, grad_weights, flag, count, width, top_k, **config.options()
            )
    return grad_rows, grad_weights


def _inverse(order: Tensor) -> Tensor:
    """int64 ``[T · K]``: the slot of each row, -1 where no slot has it; what is no row goes behind the last."""
    flat = order.flatten().long()
    count = flat.shape[0]
    slots = torch.full((count + 1,), -1, dtype=torch.int64, device=order.device)
    flat = torch.where((flat >= 0) & (flat < count), flat, count)
    return slots.scatter_(0, flat, torch.arange(count, device=order.device))[:count]


_TOKENS, _TOP_K = 8192, 8  # the problem of the cost model


def _work(dtype: str, width: int, moved: int, indices: int, operations: int) -> Work:
    """``moved``: rows of tokens that are read or written."""
    return Work(f"{_TOKENS} × {_TOP_K}, H {width}", moved * width * SIZES[dtype] + indices, operations * width)


def _declared() -> list[Build]:
    builds: list[Build] = []
    slots, sizes, rows_of = _TOKENS * _TOP_K, "i32 i32/16 i32", "*T/16 i32/16"
    moved = _TOKENS + slots

    def declare(kernel: Any, signature: str, table: str, work: tuple[int, int, int], **flags: bool) -> None:
        for dtype in SIZES:
            for row, targets in configs.shipped(table, dtype):
                width, config = row.width or 4096, row.config
                build = Build(
                    kernel,
                    dtype,
                    f"{signature} {sizes}",
                    {**flags, **config.constexprs},
                    config.num_warps,
                    config.num_stages,
                    note=f"D {width}" + ", weights" * flags.get("HAS_WEIGHTS", False),
                    work=_work(dtype, width, *work),
                    targets=targets,
                )
                builds.append(build)

    declare(_permute_fwd_kernel, f"{rows_of} *i64/16 *i32/16 *T/16 *i64/16", "permute_fwd", (moved, 8 * slots, 0))
    for weighted in (False, True):
        vector, extra = "*fp32/16" if weighted else "*T/16", 4 * slots * weighted
        signature = f"{rows_of} *i32/16 {vector} *T/16 *i64/16"
        work = (moved, 4 * slots + extra, slots * (1 + weighted))
        declare(_unpermute_fwd_kernel, signature, "unpermute_fwd", work, HAS_WEIGHTS=weighted)
        signature = f"{rows_of} *i64/16 {vector} *T/16"
        work = (moved, 8 * slots + extra, slots * weighted)
        declare(_unpermute_rows_bwd_kernel, signature, "unpermute_bwd", work, HAS_WEIGHTS=weighted)
    signature = f"{rows_of} {rows_of} *i32/16 *i64/16 *fp32/16 *i64/16"
    declare(_unpermute_weights_bwd_kernel, signature, "unpermute_weights", (moved, 16 * slots, 2 * slots))
    return builds


KERNELS = _declared()

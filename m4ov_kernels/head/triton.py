"""``linear_cross_entropy`` in Triton: ``chunked.py`` with these passes over a chunk's logits, for CUDA and ROCm (and,
interpreted, for CPU tensors). ``linear_logprob`` stands in ``triton_logprob.py``."""

from __future__ import annotations

from functools import partial
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from m4ov_kernels import configs
from m4ov_kernels.gpu import SIZES, Build, Work, current_device
from m4ov_kernels.head import chunked
from m4ov_kernels.head.triton_kl import KERNELS as _LINEAR_KL
from m4ov_kernels.head.triton_kl import linear_kl_bwd, linear_kl_fwd
from m4ov_kernels.head.triton_logprob import KERNELS as _LINEAR_LOGPROB
from m4ov_kernels.head.triton_logprob import linear_logprob_bwd, linear_logprob_fwd

__all__ = [
    "EPILOGUE",
    "KERNELS",
    "linear_cross_entropy_bwd",
    "linear_cross_entropy_fwd",
    "linear_kl_bwd",
    "linear_kl_fwd",
    "linear_logprob_bwd",
    "linear_logprob_fwd",
]

# A row's bits do not depend on the chunking, as long as chunks are multiples of the forward's block, which is therefore
# at most chunked.CPU_COLUMNS in every configuration.


@triton.jit(do_not_specialize=["rows", "first"])
def _cross_entropy_fwd_kernel(
    logits_ptr,  # [rows, columns]
    target_ptr,  # int64 [rows]; negative: no loss, the row is not read
    state_ptr,  # fp32 [4, rows]: maximum, sum of exp(x - maximum), the target's logit, sum of logits
    rows,
    columns,
    first,  # vocabulary index of column 0
    WANT_TOTAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    target = tl.load(target_ptr + row)
    if target >= 0:
        logits_ptr += row * columns
        state_ptr += row
        step = tl.cast(rows, tl.int64)
        maximum = tl.load(state_ptr)
        total_exp = tl.load(state_ptr + step)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            col = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + col, mask=col < columns, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(maximum, tl.max(x, axis=0))
            # While all is -inf, exp(-inf - 0) keeps the sum at 0; a NaN that the maximum lost is in the sum.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total_exp = total_exp * tl.exp(maximum - shift) + tl.sum(tl.exp(x - shift), axis=0)
            maximum = higher
            if WANT_TOTAL:
                total += tl.where(col < columns, x, 0.0)
        tl.store(state_ptr, maximum)
        tl.store(state_ptr + step, total_exp)
        if WANT_TOTAL:
            tl.store(state_ptr + 3 * step, tl.load(state_ptr + 3 * step) + tl.sum(total, axis=0))
        place = target - first
        here = (place >= 0) & (place < columns)
        at_target = tl.load(logits_ptr + place, mask=here, other=0.0).to(tl.float32)
        tl.store(state_ptr + 2 * step, at_target, mask=here)


@triton.jit(do_not_specialize=["first"])
def _cross_entropy_bwd_kernel(
    logits_ptr,  # [rows, columns]
    gradient_ptr,  # [rows, columns]; may be the logits
    target_ptr,  # int64 [rows]; negative: the row's gradient is zero
    normalizer_ptr,  # fp32 [rows, 2]: maximum, log of the sum of exp(x - maximum)
    grad_loss_ptr,  # fp32 [rows]
    columns,
    first,
    target_weight,
    uniform_weight,
    BLOCK: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = row * columns + col
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    target = tl.load(target_ptr + row)
    if target >= 0:
        x = tl.load(logits_ptr + place, mask=col < columns, other=0.0).to(tl.float32)
        grad_loss = tl.load(grad_loss_ptr + row)
        # Two steps: log p is small where p is large, and keeps its precision there.
        log_probability = x - tl.load(normalizer_ptr + 2 * row) - tl.load(normalizer_ptr + 2 * row + 1)
        probability = tl.exp(log_probability)
        wanted = tl.where(col == target - first, tl.cast(target_weight, tl.float32), 0.0)
        grad = grad_loss * (probability - wanted - tl.cast(uniform_weight, tl.float32))
        tl.store(gradient_ptr + place, grad.to(dtype), mask=col < columns)
    else:
        tl.store(gradient_ptr + place, tl.zeros([BLOCK], dtype), mask=col < columns)


@triton.jit
def _accumulate_kernel(
    accumulator_ptr,  # fp32 [count]
    addend_ptr,  # [count]
    output_ptr,  # [count], or unused
    count,
    ASSIGN: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    total = tl.load(addend_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if not ASSIGN:
        total += tl.load(accumulator_ptr + place, mask=mask, other=0.0)
    if HAS_OUTPUT:
        tl.store(output_ptr + place, total.to(output_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(accumulator_ptr + place, total, mask=mask)


def _reduce(logits: Tensor, target: Tensor, first: int, state: Tensor, want_total: bool) -> None:
    rows, columns = logits.shape
    config = configs.get("cross_entropy_fwd", logits)
    with current_device(logits):
        _cross_entropy_fwd_kernel[(rows,)](
            logits, target, state, rows, columns, first, WANT_TOTAL=want_total, **config.options()
        )


def _differentiate(
    logits: Tensor,
    gradient: Tensor,
    target: Tensor,
    first: int,
    normalizer: Tensor,
    grad_loss: Tensor,
    target_weight: float,
    uniform_weight: float,
) -> None:
    rows, columns = logits.shape
    config = configs.get("cross_entropy_bwd", logits)
    grid = (rows, triton.cdiv(columns, config.constexprs["BLOCK"]))
    with current_device(logits):
        _cross_entropy_bwd_kernel[grid](
            logits,
            gradient,
            target,
            normalizer,
            grad_loss,
            columns,
            first,
            target_weight,
            uniform_weight,
            **config.options(),
        )


def _add(accumulator: Tensor, addend: Tensor, output: Tensor | None, assign: bool) -> None:
    count = addend.numel()
    config = configs.get("accumulate", addend)
    flags = {"ASSIGN": assign, "HAS_OUTPUT": output is not None, **config.options()}
    with current_device(addend):
        grid = (triton.cdiv(count, config.constexprs["BLOCK"]),)
        _accumulate_kernel[grid](accumulator, addend, addend if output is None else output, count, **flags)


EPILOGUE = chunked.Epilogue(_reduce, _differentiate, _add, on_host=False)

# chunked.forward and chunked.backward with these passes; see there for arguments and results.
linear_cross_entropy_fwd = partial(chunked.forward, EPILOGUE)
linear_cross_entropy_bwd = partial(chunked.backward, EPILOGUE)


def _declared() -> list[Build]:
    """Every row of the tables for every dtype; with label smoothing in bf16."""
    builds = []
    rows, columns = 1024, 32000  # of the problem that the cost models state

    def declare(kernel: Any, dtype: str, signature: str, row: str, note: str, work: Work, **flags: Any) -> None:
        for shipped, targets in configs.shipped(row, dtype):
            config = shipped.config
            constexprs, warps = {**flags, **config.constexprs}, (config.num_warps, config.num_stages)
            builds.append(Build(kernel, dtype, signature, constexprs, *warps, note=note, work=work, targets=targets))

    for dtype, size in SIZES.items():
        problem, count = f"[{rows}, {columns}] logits", rows * columns
        forward = "*T/16 *i64/16 *fp32/16 i32 i32/16 i32"
        for total in (False, True) if dtype == "bf16" else (False,):
            work = Work(problem, count * size + rows * (8 + 4 * (8 if total else 6)), count * (5 if total else 4))
            note = "label smoothing" if total else ""
            declare(_cross_entropy_fwd_kernel, dtype, forward, "cross_entropy_fwd", note, work, WANT_TOTAL=total)
        backward = "*T/16 *T/16 *i64/16 *fp32/16 *fp32/16 i32/16 i32 fp32 fp32"
        work = Work(problem, 2 * count * size + rows * (8 + 3 * 4), 6 * count)
        declare(_cross_entropy_bwd_kernel, dtype, backward, "cross_entropy_bwd", "", work)
        accumulate, count = "*fp32/16 *T/16 *T/16 i32/16", rows * 4096
        for assign, last in ((True, False), (False, False), (False, True)):
            note = "first" if assign else "last" if last else "middle"
            moved = count * (size + 4 * (not assign) + (size if last else 4))
            work = Work(f"[{rows}, 4096]", moved, 0 if assign else count)
            flags = {"ASSIGN": assign, "HAS_OUTPUT": last}
            declare(_accumulate_kernel, dtype, accumulate, "accumulate", note, work, **flags)
    return builds


KERNELS = [*_declared(), *_LINEAR_LOGPROB, *_LINEAR_KL]

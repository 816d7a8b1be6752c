"""The activations in Triton, for CUDA and ROCm (and, interpreted, for CPU tensors): launches and declarations."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from m4ov_kernels import configs
from m4ov_kernels.activation.triton_kernels import (
    FUNCTIONS,
    _gated_bwd_kernel,
    _gated_fwd_kernel,
    _gelu_bwd_kernel,
    _gelu_fwd_kernel,
)
from m4ov_kernels.gpu import SIZES, Build, Work, current_device
from m4ov_kernels.layout import NUMERICS, as_rows, output


def _launch(name: str, kernel: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], **flags: Any) -> None:
    count, width = inputs[0].numel(), inputs[0].shape[-1] if inputs[0].ndim else 1
    if count == 0:
        return
    if all(tensor.is_contiguous() for tensor in inputs):
        width, config = count, configs.get(name, inputs[0])  # one long row
        operands: list[Any] = [operand for tensor in inputs for operand in (tensor, count)]
    else:
        config = configs.get(name, inputs[0], width)
        operands = [operand for tensor in inputs for operand in as_rows(tensor)]
    rows = count // width
    blocks = triton.cdiv(rows, config.constexprs["BLOCK_ROWS"]) * triton.cdiv(width, config.constexprs["BLOCK_D"])
    with current_device(inputs[0]):
        kernel[(blocks,)](*operands, *outputs, rows, width, **flags, **config.options())


def swiglu_fwd(gate: Tensor, up: Tensor, numerics: str, *, out: Tensor | None = None) -> Tensor:
    """``silu(gate) · up``, contiguous; ``out``: contiguous, may be one of the inputs."""
    return _gated_fwd("swiglu", "silu", gate, up, numerics, out)


def swiglu_bwd(
    grad_output: Tensor, gate: Tensor, up: Tensor, numerics: str, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """``(grad_gate, grad_up)``, gradients of the unrounded function, so ``numerics`` makes no difference here."""
    return _gated_bwd("swiglu", "silu", grad_output, gate, up, out)


def geglu_fwd(gate: Tensor, up: Tensor, approximate: str, numerics: str, *, out: Tensor | None = None) -> Tensor:
    """``gelu(gate) · up``, contiguous; ``out``: contiguous, may be one of the inputs."""
    return _gated_fwd("geglu", approximate, gate, up, numerics, out)


def geglu_bwd(
    grad_output: Tensor,
    gate: Tensor,
    up: Tensor,
    approximate: str,
    numerics: str,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(grad_gate, grad_up)``, gradients of the unrounded function, so ``numerics`` makes no difference here."""
    return _gated_bwd("geglu", approximate, grad_output, gate, up, out)


def _gated_fwd(name: str, function: str, gate: Tensor, up: Tensor, numerics: str, out: Tensor | None) -> Tensor:
    result = output(out, gate.shape, gate, gate.dtype)
    flags = {"FUNCTION": FUNCTIONS[function], "NUMERICS": NUMERICS[numerics]}
    _launch(f"{name}_fwd", _gated_fwd_kernel, (gate, up), (result,), **flags)
    return result


def _gated_bwd(
    name: str, function: str, grad_output: Tensor, gate: Tensor, up: Tensor, out: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    grad_gate = output(out and out[0], gate.shape, gate, gate.dtype)
    grad_up = output(out and out[1], gate.shape, gate, gate.dtype)
    inputs, flags = (grad_output, gate, up), {"FUNCTION": FUNCTIONS[function]}
    _launch(f"{name}_bwd", _gated_bwd_kernel, inputs, (grad_gate, grad_up), **flags)
    return grad_gate, grad_up


def _rows(as_one: bool, *tensors: Tensor) -> tuple[list[Any], int, int]:
    """``([tensor, distance of its rows, …], rows, width)``; ``as_one``: all are contiguous, and one long row."""
    first = tensors[0]
    if as_one:
        return [operand for tensor in tensors for operand in (tensor, first.numel())], 1, first.numel()
    operands = [operand for tensor in tensors for operand in as_rows(tensor)]
    return operands, first.shape[:-1].numel(), first.shape[-1]


def gelu_fwd(input: Tensor, bias: Tensor | None, approximate: str, *, out: Tensor | None = None) -> Tensor:
    """``gelu(input + bias)``, contiguous; ``out``: contiguous, may be the input."""
    result = output(out, input.shape, input, input.dtype)
    if input.numel() == 0:
        return result
    as_one = bias is None and input.is_contiguous()
    operands, rows, width = _rows(as_one, input)
    config = configs.get("gelu_fwd", input, None if as_one else width)
    blocks = triton.cdiv(rows, config.constexprs["BLOCK_ROWS"]) * triton.cdiv(width, config.constexprs["BLOCK_D"])
    flags = {"FUNCTION": FUNCTIONS[approximate], "HAS_BIAS": bias is not None}
    vector = input if bias is None else bias.contiguous()
    with current_device(input):
        _gelu_fwd_kernel[(blocks,)](*operands, vector, result, rows, width, **flags, **config.options())
    return result


def gelu_bwd(
    grad_output: Tensor,
    input: Tensor,
    bias: Tensor | None,
    approximate: str,
    need_bias: bool,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(grad_input, grad_bias)``; ``grad_bias`` is empty unless ``need_bias``."""
    grad_input = output(out and out[0], input.shape, input, input.dtype)
    grad_bias = output(out and out[1], input.shape[-1:] if need_bias else (0,), input, input.dtype)
    if input.numel() == 0:
        return grad_input, grad_bias.zero_()
    as_one = bias is None and grad_output.is_contiguous() and input.is_contiguous()
    operands, rows, width = _rows(as_one, grad_output, input)
    config = configs.get("gelu_bwd", input, None if as_one else width)
    columns = triton.cdiv(width, config.constexprs["BLOCK_D"])
    programs = _programs(triton.cdiv(rows, config.constexprs["BLOCK_ROWS"]), columns, need_bias)
    partial = torch.empty((programs, width) if need_bias else (0,), dtype=torch.float32, device=input.device)
    flags = {"FUNCTION": FUNCTIONS[approximate], "HAS_BIAS": bias is not None, "NEED_BIAS": need_bias}
    operands += [input if bias is None else bias.contiguous(), grad_input, partial]
    with current_device(input):
        _gelu_bwd_kernel[(columns, programs)](*operands, rows, width, **flags, **config.options())
    if need_bias:
        grad_bias.copy_(partial.sum(0))
    return grad_input, grad_bias


def _programs(blocks: int, columns: int, need_bias: bool) -> int:
    """Programs for each block of columns, by the shape alone: enough to fill a large GPU; each makes a partial sum."""
    return max(1, min(blocks, 512 // columns if need_bias else 65535))


def _work(rows: int, width: int, dtype: str, tensors: int, operations: int) -> Work:
    count = rows * width
    return Work(f"[{rows}, {width}]", tensors * count * SIZES[dtype], operations * count)


def _declared() -> list[Build]:
    """Every row of the tables for every dtype: dense tensors are one long row, others have gaps between theirs."""
    builds: list[Build] = []

    def declare(kernel: Any, dtype: str, signature: str, table: str, note: str, work: tuple[int, int], **flags: Any):  # type: ignore[no-untyped-def]
        for row, targets in configs.shipped(table, dtype):
            config = row.config
            title = f"{f'D {row.width}' if row.width else 'dense'}{note}"
            model = _work(4096, row.width or 4096, dtype, *work)
            constexprs = {**flags, **config.constexprs}
            stages = (config.num_warps, config.num_stages)
            builds.append(Build(kernel, dtype, signature, constexprs, *stages, note=title, work=model, targets=targets))

    rows_of, sizes = "*T/16 i32/16", "i32 i32/16"
    for dtype in SIZES:
        for name, function in (("swiglu", "silu"), ("geglu", "tanh"), ("geglu", "none")):
            code = FUNCTIONS[function]
            numbers = ("hf", "fp32") if dtype == "bf16" and function == "silu" else ("hf",)
            for numerics in numbers:
                fwd = (_gated_fwd_kernel, dtype, f"{rows_of} {rows_of} *T/16 {sizes}", f"{name}_fwd")
                note = f", {function}, {numerics}"
                # exp, two of the quotient, two products; GELU's exponent is three more
                declare(*fwd, note, (3, 5 if function == "silu" else 8), FUNCTION=code, NUMERICS=NUMERICS[numerics])
            bwd = (_gated_bwd_kernel, dtype, f"{rows_of} {rows_of} {rows_of} *T/16 *T/16 {sizes}", f"{name}_bwd")
            declare(*bwd, f", {function}", (5, 11 if function == "silu" else 16), FUNCTION=code)
        for function in ("tanh", "none"):
            code = FUNCTIONS[function]
            for bias in (False, True):
                note = f", {function}" + ", bias" * bias
                fwd = (_gelu_fwd_kernel, dtype, f"{rows_of} *T/16 *T/16 {sizes}", "gelu_fwd")
                declare(*fwd, note, (2, 7 + bias), FUNCTION=code, HAS_BIAS=bias)
                bwd = (_gelu_bwd_kernel, dtype, f"{rows_of} {rows_of} *T/16 *T/16 *fp32/16 {sizes}", "gelu_bwd")
                declare(*bwd, note, (3, 13 + 2 * bias), FUNCTION=code, HAS_BIAS=bias, NEED_BIAS=bias)
    return builds


KERNELS = _declared()

"""``invariant_linear``: a linear layer of which a row keeps its bits in any batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.dispatch import KERNEL_DTYPES, native_extension

_OP = "invariant_linear"


def invariant_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ weightᵀ + bias`` of which a row's bits depend on that row and the parameters alone: ``F.linear`` for
    where one row, a batch of them, and a batch of other company must be the same to the bit.

    A plain function, not a registered operator: it has one implementation, the compiled CPU kernel, and refuses what
    that cannot serve, because nothing else keeps the promise. Where it is not needed, ``F.linear`` is what to call.

    Invariance: on the CPU, forward and gradient of ``input``: whatever the other rows, their number, the place in the
    batch, strides, alignment and the number of threads. The gradients of ``weight`` and ``bias`` are sums over the
    batch; those are PyTorch's.

    Args:
        input: ``[..., K]``, bfloat16, float16 or float32, on the CPU; any strides.
        weight: ``[N, K]``, same dtype.
        bias: ``[N]``, same dtype, or ``None``.

    Returns:
        ``[..., N]``, contiguous: summed in float32 in one order, rounded once.

    Saves for backward: ``input`` and ``weight``.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or dtypes differ.
        ValueError: shapes or devices do not fit.
        RuntimeError: the compiled CPU kernel cannot serve the call (a GPU, float64, a subclass of tensors, an install
            without it, ``torch.compile``, ``torch.func``), or a double backward is asked for.

    Source: the problem, and its cure by one order of summation: He et al., "Defeating Nondeterminism in LLM Inference",
    Thinking Machines Lab 2025.
    """
    _check(input, weight, bias)
    flat = input.reshape(-1, input.shape[-1])
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (input, weight, bias)):
        result = _InvariantLinear.apply(flat, weight, bias)
    else:
        from m4ov_kernels.gemm import native_invariant as native

        result = native.invariant_linear_fwd(flat, weight, bias)
    return result.view(*input.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]


class _InvariantLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        from m4ov_kernels.gemm import native_invariant as native

        ctx.save_for_backward(input, weight)
        return native.invariant_linear_fwd(input, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from m4ov_kernels.gemm import native_invariant as native

        input, weight = ctx.saved_tensors
        need_input, need_weight, need_bias = ctx.needs_input_grad
        return (
            native.invariant_linear_fwd(grad_output, weight, None, transposed=True) if need_input else None,
            torch.ops.aten.mm(grad_output.t(), input) if need_weight else None,
            grad_output.sum(0) if need_bias else None,
        )


def _check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    checks.float_tensor(_OP, "input", input)
    checks.float_tensor(_OP, "weight", weight)
    if not input.shape or input.shape[-1] == 0:
        checks.refuse(ValueError, _OP, "input", "[..., K] with K at least 1", list(input.shape))
    if weight.ndim != 2 or weight.shape[1] != input.shape[-1] or weight.shape[0] == 0:
        expected = f"[N, {input.shape[-1]}] with N at least 1"
        checks.refuse(ValueError, _OP, "weight", expected, list(weight.shape))
    if bias is not None:
        checks.float_tensor(_OP, "bias", bias)
        if bias.shape != weight.shape[:1]:
            checks.refuse(ValueError, _OP, "bias", f"[{weight.shape[0]}]", list(bias.shape))
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype is not input.dtype:
            checks.refuse(TypeError, _OP, name, f"{input.dtype}, as input", tensor.dtype)
        if tensor is not None and tensor.device != input.device:
            checks.refuse(ValueError, _OP, name, f"on {input.device}, as input", f"one on {tensor.device}")
    reason = unavailable(input.device.type, input.dtype)
    if any(type(x) not in (Tensor, torch.nn.Parameter, type(None)) for x in (input, weight, bias)):
        reason = "its kernel is for plain tensors, not for subclasses"
    if torch._C._are_functorch_transforms_active():
        reason = "it is not for torch.func transforms"
    if reason is not None:
        raise RuntimeError(f"{_OP}: {reason}")


def unavailable(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot serve such tensors; ``None`` if it can."""
    if torch.compiler.is_compiling():
        return "it is not for torch.compile"
    if device_type != "cpu" or dtype not in KERNEL_DTYPES:
        return f"its kernel is for bfloat16, float16 and float32 on the CPU; got {dtype} on {device_type}"
    extension, reason = native_extension()
    return reason if extension is None else None

"""Gated activations: ``swiglu``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.activation import reference
from m4ov_kernels.dispatch import Operator

__all__ = ["swiglu"]


def swiglu(gate: Tensor, up: Tensor, *, numerics: str = "hf") -> Tensor:
    """Gated SiLU: ``gate · sigmoid(gate) · up``, elementwise.

    Args:
        gate, up: ``[..., D]``, same shape, dtype (bfloat16, float16, float32 or float64) and device; any strides, so
            the two halves of one projection need no copy.
        numerics: ``"hf"`` and ``"vllm"`` round ``silu(gate)`` to the dtype before the product; ``"fp32"`` rounds once.

    Returns:
        A contiguous tensor of the same shape and dtype.

    Saves for backward: ``gate`` and ``up``; the gradient is computed in float32 from both.

    Raises:
        TypeError: an argument is not a floating-point, dense tensor, or the dtypes differ.
        ValueError: shapes or devices differ, or ``numerics`` is unknown.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
    """
    checks.float_tensor("swiglu", "gate", gate)
    checks.float_tensor("swiglu", "up", up)
    if up.dtype is not gate.dtype:
        checks.refuse(TypeError, "swiglu", "up", f"{gate.dtype}, as gate", up.dtype)
    if up.shape != gate.shape or up.device != gate.device:
        expected = f"{list(gate.shape)} on {gate.device}, as gate"
        checks.refuse(ValueError, "swiglu", "up", expected, checks.describe(up))
    if numerics not in checks.NUMERICS:
        checks.one_of("swiglu", "numerics", numerics, checks.NUMERICS)
    implementation = SWIGLU.select(gate.device, gate.dtype)
    if implementation is None:
        return reference.swiglu(gate, up, numerics)
    return SWIGLU(implementation, gate, up, numerics)


def _fwd_fake(gate: Tensor, up: Tensor, numerics: str) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _bwd_fake(grad_output: Tensor, gate: Tensor, up: Tensor, numerics: str) -> tuple[Tensor, Tensor]:
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    return grad_gate, torch.empty_like(grad_gate)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.numerics = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, needs: Any, bwd: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    grad_gate, grad_up = bwd(grads[0], gate, up, ctx.numerics)
    return grad_gate if needs[0] else None, grad_up if needs[1] else None, None


SWIGLU = Operator(
    "activation",
    "swiglu",
    fwd_schema="(Tensor gate, Tensor up, str numerics) -> Tensor",
    bwd_schema="(Tensor grad_output, Tensor gate, Tensor up, str numerics) -> (Tensor grad_gate, Tensor grad_up)",
    fwd_fake=_fwd_fake,
    bwd_fake=_bwd_fake,
    results=lambda *_: 1,
    setup_context=_setup_context,
    backward=_backward,
)

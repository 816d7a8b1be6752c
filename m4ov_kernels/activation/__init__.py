"""Activations: ``gelu``, and the gated ``swiglu`` and ``geglu``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.activation import reference
from m4ov_kernels.dispatch import Operator

__all__ = ["geglu", "gelu", "gelu_tanh", "swiglu"]

APPROXIMATIONS = ("tanh", "none")


def swiglu(gate: Tensor, up: Tensor, *, numerics: str = "hf") -> Tensor:
    """Gated SiLU: ``gate · sigmoid(gate) · up``, elementwise.

    Args:
        gate, up: ``[..., D]``, same shape, dtype (bfloat16, float16, float32 or float64) and device; any strides, so
            the two halves of one projection need no copy.
        numerics: ``"hf"`` and ``"vllm"`` round ``silu(gate)`` to the dtype before the product; ``"fp32"`` rounds once.

    Returns:
        A contiguous tensor of the same shape and dtype.

    Saves for backward: ``gate`` and ``up``; the gradient is computed in float32 from both.

    Invariance: each element is computed from its own operands by one sequence of operations, forward and backward, so
    that its bits depend on nothing else: on the CPU wherever it stands in memory and on any number of threads; on a GPU
    by kernels whose configuration no number of rows chooses.

    Raises:
        TypeError: an argument is not a floating-point, dense tensor, or the dtypes differ.
        ValueError: shapes or devices differ, or ``numerics`` is unknown.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
    """
    _check_gated("swiglu", gate, up, numerics)
    implementation = SWIGLU.select(gate.device, gate.dtype)
    if implementation is None:
        return reference.swiglu(gate, up, numerics)
    return SWIGLU(implementation, gate, up, numerics)


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "tanh", numerics: str = "hf") -> Tensor:
    """Gated GELU: ``gelu(gate) · up``, elementwise.

    Args:
        gate, up: as in :func:`swiglu`.
        approximate: ``"tanh"`` (as Gemma, T5 v1.1 and SigLIP-like towers have it) or ``"none"``, the error function.
        numerics: ``"hf"`` and ``"vllm"`` round ``gelu(gate)`` to the dtype before the product; ``"fp32"`` rounds once.

    Returns:
        A contiguous tensor of the same shape and dtype.

    Saves for backward: ``gate`` and ``up``; the gradient is computed in float32 from both.

    Invariance: each element is computed from its own operands by one sequence of operations, forward and backward, so
    that its bits depend on nothing else: on the CPU wherever it stands in memory and on any number of threads; on a GPU
    by kernels whose configuration no number of rows chooses.

    Raises:
        TypeError: an argument is not a floating-point, dense tensor, or the dtypes differ.
        ValueError: shapes or devices differ, or ``approximate`` or ``numerics`` is unknown.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
    """
    _check_gated("geglu", gate, up, numerics)
    if approximate not in APPROXIMATIONS:
        checks.one_of("geglu", "approximate", approximate, APPROXIMATIONS)
    implementation = GEGLU.select(gate.device, gate.dtype)
    if implementation is None:
        return reference.geglu(gate, up, approximate, numerics)
    return GEGLU(implementation, gate, up, approximate, numerics)


def gelu(input: Tensor, *, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """Gaussian error linear unit, ``x · Phi(x)`` of ``x = input`` or ``x = input + bias``, elementwise.

    Args:
        input: ``[..., D]``, bfloat16, float16, float32 or float64; any strides.
        bias: ``[D]``, that of the linear layer whose product ``input`` is: its gradient is then summed while the
            input's is computed. Of the dtype of ``input`` for the fast kernels; another floating dtype is served by
            the reference.
        approximate: ``"none"``, the error function, or ``"tanh"``, ``x/2 · (1 + tanh(sqrt(2/pi) (x + 0.044715 x³)))``.

    Returns:
        A contiguous tensor of the shape and dtype of ``input``. Everything is in float32 until then, the sum too.

    Saves for backward: ``input`` and ``bias``. The gradient of ``bias`` is summed in float32 over a fixed split of the
    rows: its bits depend on nothing else.

    Invariance: each element is computed from its own operands by one sequence of operations, forward and backward, so
    that its bits depend on nothing else: on the CPU wherever it stands in memory and on any number of threads; on a GPU
    by kernels whose configuration no number of rows chooses. The gradient of ``bias`` is a sum over the
    batch.

    Raises:
        TypeError: ``input`` or ``bias`` is not a floating-point, dense tensor.
        ValueError: the shape or device of ``bias`` does not fit, or ``approximate`` is unknown.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415.
    """
    return _gelu("gelu", input, bias, approximate)


def gelu_tanh(input: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """:func:`gelu` with ``approximate="tanh"``: the activation of the vision towers (``gelu_pytorch_tanh``). What holds
    of that one (invariance, errors, what is saved) holds here."""
    return _gelu("gelu_tanh", input, bias, "tanh")


def _gelu(name: str, input: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    checks.float_tensor(name, "input", input)
    dtype: Any = input.dtype
    if bias is not None:
        checks.float_tensor(name, "bias", bias)
        shape = input.shape
        if bias.ndim != 1 or bias.shape != shape[-1:]:
            expected = f"{list(shape[-1:])}, the size of the last dimension of input" if shape else "None for a scalar"
            checks.refuse(ValueError, name, "bias", expected, f"{list(bias.shape)} for {list(shape)}")
        if bias.device != input.device:
            checks.refuse(ValueError, name, "bias", f"on {input.device}", f"one on {bias.device}")
        if bias.dtype is not dtype:
            dtype = None
    if approximate not in APPROXIMATIONS:
        checks.one_of(name, "approximate", approximate, APPROXIMATIONS)
    implementation = GELU.select(input.device, dtype)
    if implementation is None:
        return reference.gelu(input, bias, approximate)
    return GELU(implementation, input, bias, approximate)


def _check_gated(name: str, gate: Tensor, up: Tensor, numerics: str) -> None:
    checks.float_tensor(name, "gate", gate)
    checks.float_tensor(name, "up", up)
    if up.dtype is not gate.dtype:
        checks.refuse(TypeError, name, "up", f"{gate.dtype}, as gate", up.dtype)
    if up.shape != gate.shape or up.device != gate.device:
        expected = f"{list(gate.shape)} on {gate.device}, as gate"
        checks.refuse(ValueError, name, "up", expected, checks.describe(up))
    if numerics not in checks.NUMERICS:
        checks.one_of(name, "numerics", numerics, checks.NUMERICS)


def _gated_fwd_fake(gate: Tensor, up: Tensor, *options: str) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _gated_bwd_fake(grad_output: Tensor, gate: Tensor, up: Tensor, *options: str) -> tuple[Tensor, Tensor]:
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    return grad_gate, torch.empty_like(grad_gate)


def _gated_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, *ctx.options = inputs
    ctx.save_for_backward(gate, up)


def _gated_backward(ctx: Any, needs: Any, bwd: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    grad_gate, grad_up = bwd(grads[0], gate, up, *ctx.options)
    return grad_gate if needs[0] else None, grad_up if needs[1] else None, *(None for _ in ctx.options)


def _gated(name: str, options: str) -> Operator:
    return Operator(
        "activation",
        name,
        fwd_schema=f"(Tensor gate, Tensor up, {options}) -> Tensor",
        bwd_schema=f"(Tensor grad_output, Tensor gate, Tensor up, {options}) -> (Tensor grad_gate, Tensor grad_up)",
        fwd_fake=_gated_fwd_fake,
        bwd_fake=_gated_bwd_fake,
        results=lambda *_: 1,
        setup_context=_gated_setup_context,
        backward=_gated_backward,
    )


def _gelu_fwd_fake(input: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _gelu_bwd_fake(
    grad_output: Tensor, input: Tensor, bias: Tensor | None, approximate: str, need_bias: bool
) -> tuple[Tensor, Tensor]:
    grad_input = torch.empty_like(input, memory_format=torch.contiguous_format)
    return grad_input, input.new_empty(input.shape[-1:] if need_bias else 0)


def _gelu_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, bias, ctx.approximate = inputs
    ctx.save_for_backward(input, bias)


def _gelu_backward(ctx: Any, needs: Any, bwd: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    input, bias = ctx.saved_tensors
    grad_input, grad_bias = bwd(grads[0], input, bias, ctx.approximate, needs[1])
    return grad_input if needs[0] else None, grad_bias if needs[1] else None, None


SWIGLU = _gated("swiglu", "str numerics")
GEGLU = _gated("geglu", "str approximate, str numerics")
GELU = Operator(
    "activation",
    "gelu",
    fwd_schema="(Tensor input, Tensor? bias, str approximate) -> Tensor",
    bwd_schema="(Tensor grad_output, Tensor input, Tensor? bias, str approximate, bool need_bias)"
    " -> (Tensor grad_input, Tensor grad_bias)",
    fwd_fake=_gelu_fwd_fake,
    bwd_fake=_gelu_bwd_fake,
    results=lambda *_: 1,
    setup_context=_gelu_setup_context,
    backward=_gelu_backward,
)

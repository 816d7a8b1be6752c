"""Normalisations: ``rms_norm`` and ``layer_norm``."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.dispatch import Operator
from m4ov_kernels.norm import reference

__all__ = ["layer_norm", "rms_norm"]


@overload
def rms_norm(
    hidden_states: Tensor, weight: Tensor, *, eps: float, residual: None = None, numerics: str = "hf"
) -> Tensor: ...
@overload
def rms_norm(
    hidden_states: Tensor, weight: Tensor, *, eps: float, residual: Tensor, numerics: str = "hf"
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    hidden_states: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    numerics: str = "hf",
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square normalisation over the last dimension, optionally after a residual add.

    ``y = x / sqrt(mean(x²) + eps) · weight`` with ``x = hidden_states`` or ``x = hidden_states + residual``.

    Args:
        hidden_states: ``[..., D]``, bfloat16, float16, float32 or float64; any strides.
        weight: ``[D]``. Of the dtype of ``hidden_states`` for the fast kernels; another floating dtype is served by the
            reference and promotes as PyTorch promotes.
        eps: added to the mean square; > 0 or 0.
        residual: ``[..., D]``, same shape and dtype as ``hidden_states``.
        numerics: where results are rounded to the dtype of ``hidden_states``. ``"hf"`` (Hugging Face): the sum, the
            normalised value before the multiply by ``weight``, and the product. ``"vllm"``: the sum and the product.
            ``"fp32"``: the product only (the sum that is returned is rounded, the one that is normalised is not).

    Returns:
        ``y``, shaped as ``hidden_states``; with ``residual`` the pair ``(y, hidden_states + residual)``.

    Saves for backward: ``hidden_states`` (or the returned sum; of float16 with ``"fp32"``, where that may be infinite
    and what is normalised is not, both summands), ``weight`` and the reciprocal root, float32 ``[...]``.
    The gradient of ``weight`` is summed in float32 over a fixed split of the rows: its bits depend on nothing else.

    Invariance: a row's bits, results and gradients of activations, depend on that row and the parameters alone (not on
    other rows, their number, strides, alignment or threads): on the CPU always; on a GPU one configuration serves a
    width and dtype, whatever the number of rows. Gradients of parameters are sums over the batch, the same bits on any
    number of threads.

    Raises:
        TypeError: a tensor argument is not a floating-point, dense tensor, or ``residual`` has another dtype.
        ValueError: a shape, device, ``eps`` or ``numerics`` does not fit.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.
    """
    _check_hidden_states("rms_norm", hidden_states)
    _check_vector("rms_norm", "weight", weight, hidden_states)
    _check_options("rms_norm", hidden_states, eps, residual, numerics)
    dtype = hidden_states.dtype
    implementation = RMS_NORM.select(hidden_states.device, dtype if weight.dtype is dtype else None)
    if implementation is None:
        outputs = reference.rms_norm(hidden_states, weight, eps, residual, numerics)
    else:
        outputs = RMS_NORM(implementation, hidden_states, weight, residual, eps, numerics)
    return outputs[0] if residual is None else outputs[:2]


@overload
def layer_norm(
    hidden_states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    residual: None = None,
    numerics: str = "hf",
) -> Tensor: ...
@overload
def layer_norm(
    hidden_states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    residual: Tensor,
    numerics: str = "hf",
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    hidden_states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None = None,
    numerics: str = "hf",
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalisation over the last dimension, optionally after a residual add.

    ``y = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias`` with ``x = hidden_states`` or ``x = hidden_states +
    residual``; the variance is that of the row, over D, from distances to the mean, so that a large mean costs nothing.

    Args:
        hidden_states: ``[..., D]``, bfloat16, float16, float32 or float64; any strides.
        weight, bias: ``[D]``, or ``None``: 1 and 0. Of the dtype of ``hidden_states`` for the fast kernels; another
            floating dtype is served by the reference.
        eps: added to the variance; > 0 or 0.
        residual: ``[..., D]``, same shape and dtype as ``hidden_states``.
        numerics: ``"hf"`` and ``"vllm"`` round the sum to the dtype of ``hidden_states``, then the result; ``"fp32"``
            the result only (the sum that is returned is rounded, the one that is normalised is not).

    Returns:
        ``y``, of the shape and dtype of ``hidden_states``; with ``residual`` the pair ``(y, hidden_states +
        residual)``.

    Saves for backward: ``hidden_states`` (or the returned sum; of float16 with ``"fp32"``, where that may be infinite
    and what is normalised is not, both summands), ``weight``, the mean and the reciprocal root, float32 ``[...]``. The
    gradients of ``weight`` and ``bias`` are summed in float32 over a fixed split of the rows: their bits depend on
    nothing else.

    Invariance: a row's bits, results and gradients of activations, depend on that row and the parameters alone (not on
    other rows, their number, strides, alignment or threads): on the CPU always; on a GPU one configuration serves a
    width and dtype, whatever the number of rows. Gradients of parameters are sums over the batch, the same bits on any
    number of threads.

    Raises:
        TypeError: a tensor argument is not a floating-point, dense tensor, or ``residual`` has another dtype.
        ValueError: a shape, device, ``eps`` or ``numerics`` does not fit.

    Source: Ba, Kiros and Hinton, "Layer Normalization", arXiv 1607.06450.
    """
    _check_hidden_states("layer_norm", hidden_states)
    dtype: Any = hidden_states.dtype
    if weight is not None:
        _check_vector("layer_norm", "weight", weight, hidden_states)
        dtype = dtype if weight.dtype is dtype else None
    if bias is not None:
        _check_vector("layer_norm", "bias", bias, hidden_states)
        dtype = dtype if bias.dtype is dtype else None
    _check_options("layer_norm", hidden_states, eps, residual, numerics)
    implementation = LAYER_NORM.select(hidden_states.device, dtype)
    if implementation is None:
        outputs = reference.layer_norm(hidden_states, weight, bias, residual, eps, numerics)
    else:
        outputs = LAYER_NORM(implementation, hidden_states, weight, bias, residual, eps, numerics)
    return outputs[0] if residual is None else outputs[:2]


def _check_hidden_states(name: str, hidden_states: Tensor) -> None:
    checks.float_tensor(name, "hidden_states", hidden_states)
    shape = hidden_states.shape
    if not shape or shape[-1] == 0:
        checks.refuse(ValueError, name, "hidden_states", "[..., D] with D at least 1", list(shape))


def _check_vector(name: str, argument: str, vector: Tensor, hidden_states: Tensor) -> None:
    checks.float_tensor(name, argument, vector)
    shape = hidden_states.shape
    if vector.shape != shape[-1:]:
        expected = f"[{shape[-1]}], the size of the last dimension of hidden_states"
        checks.refuse(ValueError, name, argument, expected, f"{list(vector.shape)} for {list(shape)}")
    if vector.device != hidden_states.device:
        checks.refuse(ValueError, name, argument, f"on {hidden_states.device}", f"one on {vector.device}")


def _check_options(name: str, hidden_states: Tensor, eps: float, residual: Tensor | None, numerics: str) -> None:
    if residual is not None:
        checks.float_tensor(name, "residual", residual)
        if residual.dtype is not hidden_states.dtype:
            checks.refuse(TypeError, name, "residual", f"{hidden_states.dtype}", residual.dtype)
        shape = hidden_states.shape
        if residual.shape != shape or residual.device != hidden_states.device:
            expected = f"{list(shape)} on {hidden_states.device}, as hidden_states"
            checks.refuse(ValueError, name, "residual", expected, checks.describe(residual))
    if numerics not in checks.NUMERICS:
        checks.one_of(name, "numerics", numerics, checks.NUMERICS)
    if type(eps) is not float:
        checks.number(name, "eps", eps)
    if not eps >= 0:
        checks.refuse(ValueError, name, "eps", "a number, 0 or greater", repr(eps))


def _fwd_fake(
    hidden_states: Tensor, weight: Tensor, residual: Tensor | None, eps: float, numerics: str
) -> tuple[Tensor, Tensor, Tensor]:
    normed = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    total = torch.empty_like(normed) if residual is not None else normed.new_empty(0)
    return normed, total, normed.new_empty(hidden_states.shape[:-1].numel(), dtype=torch.float32)


def _bwd_fake(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    hidden_states: Tensor,
    weight: Tensor,
    rstd: Tensor,
    numerics: str,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    grad_hidden_states = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    return grad_hidden_states, torch.empty_like(weight) if need_weight else weight.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_states, weight, residual, _, numerics = inputs
    _, total, rstd = output
    ctx.numerics, ctx.has_residual = numerics, residual is not None
    if residual is None:
        ctx.save_for_backward(hidden_states, None, weight, rstd)
    else:
        ctx.save_for_backward(*_summands(hidden_states, residual, total, numerics), weight, rstd)
        ctx.set_materialize_grads(False)  # one of the two results may be unused


def _summands(hidden_states: Tensor, residual: Tensor, total: Tensor, numerics: str) -> tuple[Tensor, Tensor | None]:
    """What the backward needs of a sum: the sum, and ``None``; or what it is the sum of, in float16 where it is not
    rounded before it is normalised: there it may be beyond the range. (bfloat16's is that of float32.)"""
    if numerics == "fp32" and hidden_states.dtype is torch.float16:
        return hidden_states, residual
    return total, None


@torch.no_grad()
def _in_single(
    grads: tuple[Tensor | None, ...], x: Tensor, residual: Tensor, weight: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """The first arguments of a backward, in float32."""
    grad, grad_total, scale = (None if tensor is None else tensor.float() for tensor in (*grads, weight))
    return grad, grad_total, x.float() + residual.float(), scale


def _backward(ctx: Any, needs: Any, bwd: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, residual, weight, rstd = ctx.saved_tensors
    grad_total = grads[1] if ctx.has_residual else None
    if grads[0] is None:  # only the returned sum was used: nothing comes from the norm, whatever it holds
        grad_x, grad_weight = grad_total, torch.zeros_like(weight)
    elif residual is not None:
        found = bwd(*_in_single(grads[:2], x, residual, weight), rstd, ctx.numerics, needs[1])
        grad_x, grad_weight = (gradient.to(x.dtype) for gradient in found)
    else:
        grad_x, grad_weight = bwd(grads[0], grad_total, x, weight, rstd, ctx.numerics, needs[1])
    return (
        grad_x if needs[0] else None,
        grad_weight if needs[1] else None,
        grad_x if ctx.has_residual and needs[2] else None,
        None,
        None,
    )


RMS_NORM = Operator(
    "norm",
    "rms_norm",
    fwd_schema="(Tensor hidden_states, Tensor weight, Tensor? residual, float eps, str numerics)"
    " -> (Tensor normed, Tensor total, Tensor rstd)",
    bwd_schema="(Tensor grad_normed, Tensor? grad_total, Tensor hidden_states, Tensor weight, Tensor rstd,"
    " str numerics, bool need_weight) -> (Tensor grad_hidden_states, Tensor grad_weight)",
    fwd_fake=_fwd_fake,
    bwd_fake=_bwd_fake,
    results=lambda hidden_states, weight, residual, *_: 1 if residual is None else 2,
    setup_context=_setup_context,
    backward=_backward,
    native=("cpu", "cuda"),
)


def _layer_norm_fwd_fake(
    hidden_states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    numerics: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normed = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    total = torch.empty_like(normed) if residual is not None else normed.new_empty(0)
    mean = normed.new_empty(hidden_states.shape[:-1].numel(), dtype=torch.float32)
    return normed, total, mean, torch.empty_like(mean)


def _layer_norm_bwd_fake(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    hidden_states: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_hidden_states = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    vectors = [hidden_states.new_empty(hidden_states.shape[-1] if need else 0) for need in (need_weight, need_bias)]
    return grad_hidden_states, vectors[0], vectors[1]


def _layer_norm_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_states, weight, _, residual, eps, numerics = inputs
    _, total, mean, rstd = output
    ctx.eps, ctx.has_residual = eps, residual is not None
    if residual is None:
        ctx.save_for_backward(hidden_states, None, weight, mean, rstd)
    else:
        ctx.save_for_backward(*_summands(hidden_states, residual, total, numerics), weight, mean, rstd)
        ctx.set_materialize_grads(False)  # one of the two results may be unused


def _layer_norm_backward(ctx: Any, needs: Any, bwd: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, residual, weight, mean, rstd = ctx.saved_tensors
    grad_total = grads[1] if ctx.has_residual else None
    if grads[0] is None:  # only the returned sum was used: nothing comes from the norm, whatever it holds
        grad_x, grad_weight = grad_total, x.new_zeros(x.shape[-1])
        grad_bias = torch.zeros_like(grad_weight)
    elif residual is not None:
        arguments = _in_single(grads[:2], x, residual, weight)
        # The moments that the forward keeps are those of the rounded sum.
        _, mean, rstd = torch.native_layer_norm(arguments[2], x.shape[-1:], None, None, ctx.eps)
        found = bwd(*arguments, mean.flatten(), rstd.flatten(), needs[1], needs[2])
        grad_x, grad_weight, grad_bias = (gradient.to(x.dtype) for gradient in found)
    else:
        grad_x, grad_weight, grad_bias = bwd(grads[0], grad_total, x, weight, mean, rstd, needs[1], needs[2])
    return (
        grad_x if needs[0] else None,
        grad_weight if needs[1] else None,
        grad_bias if needs[2] else None,
        grad_x if ctx.has_residual and needs[3] else None,
        None,
        None,
    )


LAYER_NORM = Operator(
    "norm",
    "layer_norm",
    fwd_schema="(Tensor hidden_states, Tensor? weight, Tensor? bias, Tensor? residual, float eps, str numerics)"
    " -> (Tensor normed, Tensor total, Tensor mean, Tensor rstd)",
    bwd_schema="(Tensor grad_normed, Tensor? grad_total, Tensor hidden_states, Tensor? weight, Tensor mean,"
    " Tensor rstd, bool need_weight, bool need_bias)"
    " -> (Tensor grad_hidden_states, Tensor grad_weight, Tensor grad_bias)",
    fwd_fake=_layer_norm_fwd_fake,
    bwd_fake=_layer_norm_bwd_fake,
    results=lambda hidden_states, weight, bias, residual, *_: 1 if residual is None else 2,
    setup_context=_layer_norm_setup_context,
    backward=_layer_norm_backward,
)

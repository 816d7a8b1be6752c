"""Linears of quantised weights: ``int4_linear``, ``int8_linear``, ``fp8_linear``, and the raw operator of all three."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.activation import gelu, swiglu
from m4ov_kernels.dispatch import Operator, invariance_requested
from m4ov_kernels.gemm import int4_cuda, options, reference
from m4ov_kernels.gemm.panels import KINDS, PANEL, Panels
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight
from m4ov_kernels.gemm.weights.fp8 import BLOCK
from m4ov_kernels.gemm.weights.int4 import WHOLE_ROW

EPILOGUES = tuple(name for name in options.EPILOGUES if name != "none")
_CLASSES = {kind: weight for weight, kind in KINDS.items()}
# To how many rows "auto" multiplies bfloat16 activations with an Int4Weight, and what it takes for more.
FEW_ROWS = {"cpu": 4, "cuda": 64}
MANY = {"cpu": "int8", "cuda": "fp8"}


def int4_linear(
    x: Tensor,
    weight: Int4Weight | Panels,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "auto",
    epilogue: str | None = None,
) -> Tensor:
    """``epilogue(x̂ @ Ŵᵀ + bias) + residual``, Ŵ the four-bit weight: W4A16 for few rows, W4A8 for many, of one weight.

    Ŵ is ``weight.dequantize`` without any rounding, ``(q − z)·s``. x̂ is ``x``, times the weight's ``pre_quant_scale``
    in float32 if it has one, rounded as ``activation`` says. What follows the products is in float32, rounded once.

    Args:
        x: ``[..., K]``, bfloat16, float16, float32 or float64; any strides.
        weight: ``[N, K]``, on the device of ``x``; or, on the CPU, the :class:`m4ov_kernels.gemm.panels.Panels` of one,
            with the epilogue "swiglu" paired or not. The layout that the CPU's kernels read is made at the first call
            and kept with the weight.
        bias: ``[N]``, of the dtype of ``x``.
        residual: shaped as the result, of the dtype of ``x``.
        activation: ``"bf16"``: rounded to bfloat16. ``"int8"``, ``"fp8"`` (e4m3): every row over its own scale, its
            largest magnitude over 127 or 448, at least 2⁻¹²⁶, all in float32, half to even; a row that is not finite
            is NaN. ``"auto"``: on the CPU ``"bf16"`` up to 4 rows, else ``"int8"``; on a GPU ``"bf16"`` up to 64, else
            ``"fp8"``; inside :func:`m4ov_kernels.invariant` always ``"bf16"``.
        epilogue: ``"gelu"`` (of the error function), ``"gelu_tanh"``, ``"swiglu"`` (the weight's rows are
            [gate; up], N = 2·I: ``silu(gate) · up``), or ``None``.

    Returns:
        ``[..., N]`` (``"swiglu"``: ``[..., N / 2]``), contiguous, of the dtype of ``x``.

    The weight is frozen. Gradients of ``x`` are those of x̂ (the rounding passes them straight through), by dequantising
    the weight a few input features at a time. Saves for backward: the weight, nothing else without an ``epilogue``.
    With one, where gradients are wanted, the product is made in float32, saved, and activated by
    :func:`m4ov_kernels.gelu` or :func:`m4ov_kernels.swiglu`: the same function, perhaps other bits.

    Invariance: with an ``activation`` other than ``"auto"``, on the CPU, a row's bits, and those of its gradients,
    depend on that row and the weight alone, not on other rows, the number of threads, strides or alignment. ``"auto"``
    chooses by the number of rows. The gradient of ``bias`` is a sum over the batch. Inside
    :func:`m4ov_kernels.invariant` a call with an epilogue has the same bits with and without gradients, and what the
    CPU's kernels cannot serve raises ``RuntimeError``.

    Under ``torch.compile`` a weight is laid out when a call is traced.

    Raises:
        TypeError: an argument is not of the kind above, or dtypes differ.
        ValueError: shapes, devices or options do not fit.

    Source: of the schemes, Frantar et al., "GPTQ", arXiv 2210.17323, and Lin et al., "QServe", arXiv 2405.04532; of the
    straight-through gradient, Bengio et al., arXiv 1308.3432.
    """
    return _linear("int4_linear", "int4", x, weight, bias, residual, activation, epilogue)


def int8_linear(
    x: Tensor,
    weight: Int8Weight | Panels,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    epilogue: str | None = None,
) -> Tensor:
    """``epilogue(x̂ @ Ŵᵀ + bias) + residual``, Ŵ the eight-bit weight, x̂ eight-bit codes: W8A8. The codes of every row
    of ``x`` are made inside, over its own scale, as :func:`int4_linear` has them with ``activation="int8"``; products
    are summed exactly, as integers.

    Args:
        weight: ``[N, K]``, or its panels; the others as in :func:`int4_linear`, which also says what is saved for
            backward, which errors are raised, and how an epilogue is differentiated.

    Returns:
        ``[..., N]`` (``"swiglu"``: ``[..., N / 2]``), contiguous, of the dtype of ``x``.

    Invariance: on the CPU a row's bits, and those of its gradients, depend on that row and the weight alone; the
    gradient of ``bias`` is a sum over the batch.

    Source: Dettmers et al., "LLM.int8()", arXiv 2208.07339, without its outliers.
    """
    return _linear("int8_linear", "int8", x, weight, bias, residual, "int8", epilogue)


def fp8_linear(
    x: Tensor,
    weight: Fp8Weight | Panels,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "auto",
    epilogue: str | None = None,
) -> Tensor:
    """``epilogue(x̂ @ Ŵᵀ + bias) + residual``, Ŵ the e4m3 weight with its scales.

    Args:
        weight: ``[N, K]``, or its panels; the others as in :func:`int4_linear`, which also says what is saved for
            backward, which errors are raised, and how an epilogue is differentiated.
        activation: ``"bf16"``: ``x`` rounded to bfloat16. ``"fp8"``: to e4m3 over a scale, the largest magnitude over
            448, at least 2⁻¹²⁶: of every row; for a weight of blocks, of every 128 features of a row; or, if the
            weight has one, over its ``input_scale`` (then what lies past ±448 scales is ±448 scales, and only NaN is
            NaN). ``"auto"``: ``"bf16"`` on the CPU and inside :func:`m4ov_kernels.invariant`, ``"fp8"`` on a GPU.

    Returns:
        ``[..., N]`` (``"swiglu"``: ``[..., N / 2]``), contiguous, of the dtype of ``x``.

    Invariance: on the CPU a row's bits, and those of its gradients, depend on that row and the weight alone; the
    gradient of ``bias`` is a sum over the batch.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433; blocks: "DeepSeek-V3", arXiv
    2412.19437.
    """
    return _linear("fp8_linear", "fp8", x, weight, bias, residual, activation, epilogue)


ACTIVATIONS = {"int4": ("auto", "bf16", "int8", "fp8"), "int8": ("int8",), "fp8": ("auto", "bf16", "fp8")}


def _linear(
    op: str,
    kind: str,
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    epilogue: str | None,
) -> Tensor:
    _check(op, kind, x, weight, bias, residual, activation, epilogue)
    invariant = invariance_requested()
    rows, dtype = x.shape[:-1].numel(), x.dtype
    activation = resolved(kind, activation, rows, x.device.type, invariant)
    after = epilogue or "none"
    # An epilogue that is to be differentiated, or whose bits must not depend on that, or of panels that aren't paired.
    composed = after != "none" and (
        invariant or _differentiated(x, bias, residual) or (after == "swiglu" and _in_panels(weight, paired=False))
    )
    asked = (kind, rows, _act_order(weight), activation, "none" if composed else after)
    implementation = QUANTIZED_LINEAR.select(x.device, dtype, *asked)
    backend = "reference" if implementation is None else implementation.backend
    if invariant and backend != "native":
        raise RuntimeError(f"{op}: invariance was asked for, but backend {backend!r} is not invariant")
    if implementation is None:
        held = weight.weight() if type(weight) is Panels else weight
        return reference.quantized_linear(x, held, bias, residual, activation, after)
    flat = x.reshape(rows, x.shape[-1])
    by_panels = (backend, x.device.type) == ("native", "cpu")
    # The compiled CPU kernels multiply by it themselves.
    factor = weight.pre_quant_scale if kind == "int4" and not by_panels else None
    if composed or factor is not None:
        flat, bias = flat.float(), None if bias is None else bias.float()
        residual = None if residual is None else residual.float()
        if factor is not None:
            flat = flat * factor.float()
    width = weight.shape[0] // 2 if after == "swiglu" else weight.shape[0]
    to_add = None if residual is None else residual.reshape(rows, width)
    *operands, input_scale, group = _operands(weight, by_panels, after == "swiglu" and not composed)
    operands.append(None if kind == "fp8" and activation != "fp8" else input_scale)
    if not composed:
        scheme = (kind, weight.shape[0], group, activation, after)
        result: Tensor = QUANTIZED_LINEAR(implementation, flat, *operands, bias, to_add, *scheme)
    else:
        by_turns = by_panels and _in_panels(weight, paired=True)  # gates and ups, 64 each, the padding too
        scheme = (kind, operands[0].shape[0] * PANEL if by_turns else weight.shape[0], group, activation, "none")
        product = QUANTIZED_LINEAR(implementation, flat, *operands, None if by_turns else bias, None, *scheme)
        if by_turns:
            product = product.unflatten(1, (-1, 2, PANEL)).transpose(1, 2).flatten(2)[..., :width].flatten(1)
            product = product if bias is None else product + bias
        result = _activated(product, after)
        result = result if to_add is None else result + to_add
    return result.to(dtype).view(*x.shape[:-1], width)


def resolved(kind: str, activation: str, rows: int, device_type: str, invariant: bool = False) -> str:
    """What ``activation`` means for so many rows on such a device."""
    if activation != "auto":
        return activation
    place = "cuda" if device_type == "cuda" else "cpu"
    if invariant or (kind == "fp8" and place == "cpu"):
        return "bf16"
    return "bf16" if kind == "int4" and rows <= FEW_ROWS[place] else MANY[place]


def _in_panels(weight: Any, *, paired: bool) -> bool:
    return type(weight) is Panels and weight.paired is paired


def _act_order(weight: Any) -> bool:
    return (weight.order if type(weight) is Panels else getattr(weight, "g_idx", None)) is not None


def _declines(
    backend: str, device_type: str, kind: str, rows: int, act_order: bool, activation: str, epilogue: str
) -> str | None:
    """The compiled kernels of a GPU are for some calls only."""
    if (backend, device_type) != ("native", "cuda"):
        return None
    return int4_cuda.unserved(kind, rows, act_order, activation, epilogue)


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _activated(product: Tensor, epilogue: str) -> Tensor:
    if epilogue == "swiglu":
        return swiglu(*product.chunk(2, dim=-1), numerics="fp32")
    return gelu(product, approximate="tanh" if epilogue == "gelu_tanh" else "none")


def _operands(weight: Any, by_panels: bool, paired: bool) -> tuple[Any, ...]:
    """codes, scales, zeros, order, input_scale and group of the raw operator: in panels for the compiled CPU kernels,
    for which input_scale is also the factors [K] of the input of int4; for others canonical, ``group`` then the input
    features that share a scale."""
    if by_panels:
        held = weight if type(weight) is Panels else weight.panels(paired=paired)
        factor = held.input_scale if held.pre_quant_scale is None else held.pre_quant_scale
        return held.codes, held.scales, held.zeros, held.order, factor, held.group
    if type(weight) is Panels:
        weight = weight.weight()
    K = weight.shape[1]
    if type(weight) is Int4Weight:
        group = K if weight.group_size == WHOLE_ROW else weight.group_size
        return weight.packed, weight.scales, weight.zeros, weight.g_idx, None, group
    if type(weight) is Int8Weight:
        return weight.codes, weight.scales, None, None, None, K
    group = BLOCK if weight.granularity == "block" else K
    return weight.values.view(torch.uint8), weight.scales, None, None, weight.input_scale, group


def _check(
    op: str,
    kind: str,
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    epilogue: str | None,
) -> None:
    checks.float_tensor(op, "x", x)
    laid_out = type(weight) is Panels and weight.kind == kind and not (weight.paired and epilogue != "swiglu")
    if not laid_out and type(weight) is not _CLASSES[kind]:
        expected = f"an {_CLASSES[kind].__name__}, or panels of one, not paired but for 'swiglu'"
        checks.refuse(TypeError, op, "weight", expected, checks.describe(weight))
    N, K = weight.shape
    if not x.shape or x.shape[-1] != K:
        checks.refuse(ValueError, op, "x", f"[..., {K}], as weight has it", list(x.shape))
    if weight.device != x.device:
        checks.refuse(ValueError, op, "weight", f"on {x.device}, as x", f"one on {weight.device}")
    if activation not in ACTIVATIONS[kind]:
        checks.one_of(op, "activation", activation, ACTIVATIONS[kind])
    if epilogue is not None and epilogue not in EPILOGUES:
        checks.refuse(ValueError, op, "epilogue", "None or one of " + ", ".join(map(repr, EPILOGUES)), repr(epilogue))
    if epilogue == "swiglu" and N % 2:
        checks.refuse(ValueError, op, "epilogue", "for an even number of rows where it is 'swiglu'", f"{N} rows")
    width = N // 2 if epilogue == "swiglu" else N
    for name, tensor, shape in (("bias", bias, (N,)), ("residual", residual, (*x.shape[:-1], width))):
        if tensor is None:
            continue
        checks.float_tensor(op, name, tensor)
        if tensor.dtype is not x.dtype:
            checks.refuse(TypeError, op, name, f"{x.dtype}, as x", tensor.dtype)
        if tensor.shape != shape:
            checks.refuse(ValueError, op, name, str(list(shape)), list(tensor.shape))
        if tensor.device != x.device:
            checks.refuse(ValueError, op, name, f"on {x.device}, as x", f"one on {tensor.device}")


def _fwd_fake(
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: str,
    out_features: int,
    group: int,
    activation: str,
    epilogue: str,
) -> Tensor:
    return input.new_empty((input.shape[0], out_features // 2 if epilogue == "swiglu" else out_features))


def _bwd_fake(
    grad_output: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    kind: str,
    in_features: int,
    group: int,
) -> Tensor:
    return grad_output.new_empty((grad_output.shape[0], in_features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, codes, scales, zeros, order, input_scale, _, _, kind, _, group, _, ctx.epilogue = inputs
    ctx.save_for_backward(codes, scales, zeros, order, input_scale if kind == "int4" else None)
    ctx.options = (kind, input.shape[1], group)


def _backward(ctx: Any, needs: Any, bwd: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    (grad,) = grads
    assert grad is not None
    if ctx.epilogue != "none":
        raise RuntimeError("quantized_linear: only int4_linear, int8_linear and fp8_linear differentiate an epilogue")
    *operands, factor = ctx.saved_tensors
    to_input = None
    if needs[0] and factor is None:
        to_input = bwd(grad, *operands, *ctx.options)
    elif needs[0]:
        to_input = (bwd(grad.float(), *operands, *ctx.options) * factor.float()).to(grad.dtype)
    to_bias = grad.sum(0, dtype=torch.float32).to(grad.dtype) if needs[6] else None
    return to_input, *[None] * 5, to_bias, grad if needs[7] else None, *[None] * 5


QUANTIZED_LINEAR = Operator(
    "gemm",
    "quantized_linear",
    fwd_schema="(Tensor input, Tensor codes, Tensor scales, Tensor? zeros, Tensor? order, Tensor? input_scale, "
    "Tensor? bias, Tensor? residual, str kind, int out_features, int group, str activation, str epilogue) -> Tensor",
    bwd_schema="(Tensor grad_output, Tensor codes, Tensor scales, Tensor? zeros, Tensor? order, str kind, "
    "int in_features, int group) -> Tensor",
    fwd_fake=_fwd_fake,
    bwd_fake=_bwd_fake,
    results=lambda *_: 1,
    setup_context=_setup_context,
    backward=_backward,
    native=("cpu", "cuda"),
    serves=("int4_linear", "int8_linear", "fp8_linear"),
    public=False,
    backends=("native", "triton"),
    declines=_declines,
    usual={f"{kind}_linear": (kind, 1, False, resolved(kind, "auto", 1, "cuda"), "none") for kind in ACTIVATIONS},
)

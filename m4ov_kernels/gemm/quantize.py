"""Quantisation of activations: ``quantize_int8``, ``quantize_fp8``, ``rms_norm_quantize`` and ``swiglu_quantize``.

None is differentiable: gradients go straight through them, which is the business of the linear layer that calls them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.dispatch import Operator
from m4ov_kernels.gemm import reference
from m4ov_kernels.gemm.reference_quantize import BLOCK, CODES

__all__ = ["quantize_fp8", "quantize_int8", "rms_norm_quantize", "swiglu_quantize"]

GRANULARITIES = ("row", "group", "block")
_DTYPES = tuple(CODES)


def quantize_int8(input: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with a scale for each row: ``input ≈ codes · scales``.

    Everything is in float32: a row's scale is ``max(max|x| / 127, 2⁻¹²⁶)``, its codes are ``x / scale`` (a division)
    rounded to the nearest integer, half to even. A row that is not finite throughout has the scale NaN and the codes 0.

    Args:
        input: ``[..., K]``, K at least 1; bfloat16, float16, float32 or float64; any strides.

    Returns:
        ``(codes, scales)``: int8 ``[..., K]`` from -127 to 127, and float32 ``[..., 1]``.

    Invariance: a row's codes and scale depend on that row alone, and are the same bits on every instruction set and
    number of threads.

    Raises:
        TypeError: ``input`` is not a floating-point, dense tensor.
        ValueError: ``input`` has no last dimension, or one of size 0.

    Source: Dettmers et al., "LLM.int8()", arXiv 2208.07339 (vector-wise quantisation).
    """
    input = _checked("quantize_int8", "input", input)
    implementation = QUANTIZE_INT8.select(input.device, input.dtype)
    if implementation is None:
        return reference.quantize_int8(input)
    codes, scales = QUANTIZE_INT8(implementation, input)
    return codes, scales


def quantize_fp8(input: Tensor, granularity: str = "row", transposed: bool = False) -> tuple[Tensor, ...]:
    """float8_e4m3fn with a scale for each row, for each group of 128 of a row, or for each block of 128 × 128:
    ``input ≈ values · scales``.

    Everything is in float32: a scale is ``max(max|x| / 448, 2⁻¹²⁶)``, the values are ``x / scale`` (a division) rounded
    to the nearest that the format has, half to even, its subnormal numbers included. What shares a scale and is not
    finite throughout has the scale NaN and the values 0.

    Args:
        input: ``[..., K]``, K at least 1; bfloat16, float16, float32 or float64; any strides. M is the number of rows.
        granularity: ``"row"``; ``"group"``, 1 × 128, the last group may be short; ``"block"``, 128 × 128, blocks at the
            edges may be short.
        transposed: for ``"block"``: also return the values transposed, ``[K, M]``, for the product that makes the
            weight's gradient; their scales are those of the values, transposed.

    Returns:
        ``(values, scales)`` or ``(values, scales, transposed values)``: float8_e4m3fn ``[..., K]``, and float32
        ``[..., 1]``, ``[..., ⌈K/128⌉]`` or ``[⌈M/128⌉, ⌈K/128⌉]``.

    Invariance: a row's values and scales depend on that row alone (of blocks: on its 128 rows), and are the same bits
    on every instruction set and number of threads.

    Raises:
        TypeError: ``input`` is not a floating-point, dense tensor, or ``transposed`` not a bool.
        ValueError: ``input`` has no last dimension, or one of size 0; ``granularity`` is unknown, or ``transposed`` is
            asked for with another than ``"block"``.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433; groups and blocks: DeepSeek-V3,
    arXiv 2412.19437.
    """
    input = _checked("quantize_fp8", "input", input)
    if granularity not in GRANULARITIES:
        checks.one_of("quantize_fp8", "granularity", granularity, GRANULARITIES)
    if not isinstance(transposed, bool):
        checks.refuse(TypeError, "quantize_fp8", "transposed", "a bool", checks.describe(transposed))
    if transposed and granularity != "block":
        expected = f"False with granularity {granularity!r}, whose scales are no scales of columns"
        checks.refuse(ValueError, "quantize_fp8", "transposed", expected, repr(transposed))
    implementation = QUANTIZE_FP8.select(input.device, input.dtype)
    if implementation is None:
        outputs = reference.quantize_fp8(input, granularity, transposed)
    else:
        outputs = QUANTIZE_FP8(implementation, input, granularity, transposed)
    return tuple(outputs[: 2 + transposed])


def rms_norm_quantize(
    hidden_states: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    dtype: str = "int8",
    numerics: str = "hf",
) -> tuple[Tensor, ...]:
    """:func:`m4ov_kernels.rms_norm`, then :func:`quantize_int8` or :func:`quantize_fp8` by rows of what it makes: the
    same bits, without that tensor.

    Args:
        hidden_states: ``[..., D]``, bfloat16, float16, float32 or float64; any strides.
        weight: ``[D]``. Of the dtype of ``hidden_states`` for the fast kernels.
        eps, residual, numerics: as of ``rms_norm``.
        dtype: ``"int8"`` or ``"fp8"``.

    Returns:
        ``(codes, scales)``: int8 or float8_e4m3fn ``[..., D]``, and float32 ``[..., 1]``; with ``residual`` the triple
        ``(codes, scales, hidden_states + residual)``.

    Not differentiable: nothing is saved.

    Invariance: a row's codes, scale and sum depend on that row and the weight alone, whatever the number of rows,
    strides, alignment and threads; on a GPU one configuration serves a width and dtype.

    Raises:
        TypeError: a tensor argument is not a floating-point, dense tensor, or ``residual`` has another dtype.
        ValueError: a shape, device, ``eps``, ``dtype`` or ``numerics`` does not fit.

    Source: see both.
    """
    name = "rms_norm_quantize"
    hidden_states = _checked(name, "hidden_states", hidden_states)
    checks.float_tensor(name, "weight", weight)
    weight = weight.detach()
    shape = hidden_states.shape
    if weight.shape != shape[-1:]:
        expected = f"[{shape[-1]}], the size of the last dimension of hidden_states"
        checks.refuse(ValueError, name, "weight", expected, f"{list(weight.shape)} for {list(shape)}")
    if weight.device != hidden_states.device:
        checks.refuse(ValueError, name, "weight", f"on {hidden_states.device}", f"one on {weight.device}")
    if residual is not None:
        residual = _alike(name, "residual", residual, "hidden_states", hidden_states)
    _check_options(name, dtype, numerics)
    if type(eps) is not float:
        checks.number(name, "eps", eps)
    if not eps >= 0:
        checks.refuse(ValueError, name, "eps", "a number, 0 or greater", repr(eps))
    same = weight.dtype is hidden_states.dtype
    implementation = RMS_NORM_QUANTIZE.select(hidden_states.device, hidden_states.dtype if same else None)
    if implementation is None:
        outputs = reference.rms_norm_quantize(hidden_states, weight, residual, eps, numerics, dtype)
    else:
        outputs = RMS_NORM_QUANTIZE(implementation, hidden_states, weight, residual, eps, numerics, dtype)
    return tuple(outputs[: 2 if residual is None else 3])


def swiglu_quantize(gate: Tensor, up: Tensor, *, dtype: str = "int8", numerics: str = "hf") -> tuple[Tensor, Tensor]:
    """:func:`m4ov_kernels.swiglu`, then :func:`quantize_int8` or :func:`quantize_fp8` by rows of what it makes: the
    same bits, without that tensor.

    Args:
        gate, up: ``[..., D]``, D at least 1; same shape, dtype (bfloat16, float16, float32 or float64) and device; any
            strides, so the two halves of one projection need no copy.
        dtype: ``"int8"`` or ``"fp8"``.
        numerics: as of ``swiglu``.

    Returns:
        ``(codes, scales)``: int8 or float8_e4m3fn ``[..., D]``, and float32 ``[..., 1]``.

    Not differentiable: nothing is saved.

    Invariance: a row's codes and scale depend on that row alone, whatever the number of rows, strides, alignment and
    threads; on a GPU one configuration serves a width and dtype.

    Raises:
        TypeError: an argument is not a floating-point, dense tensor, or the dtypes differ.
        ValueError: shapes or devices differ, the last dimension is missing or 0, or an option is unknown.

    Source: see both.
    """
    name = "swiglu_quantize"
    gate = _checked(name, "gate", gate)
    up = _alike(name, "up", up, "gate", gate)
    _check_options(name, dtype, numerics)
    implementation = SWIGLU_QUANTIZE.select(gate.device, gate.dtype)
    if implementation is None:
        return reference.swiglu_quantize(gate, up, numerics, dtype)
    codes, scales = SWIGLU_QUANTIZE(implementation, gate, up, numerics, dtype)
    return codes, scales


def _checked(name: str, argument: str, value: Tensor) -> Tensor:
    checks.float_tensor(name, argument, value)
    shape = value.shape
    if not shape or shape[-1] == 0:
        size = "D" if argument != "input" else "K"
        checks.refuse(ValueError, name, argument, f"[..., {size}] with {size} at least 1", list(shape))
    return value.detach() if value.requires_grad else value


def _alike(name: str, argument: str, value: Tensor, other_name: str, other: Tensor) -> Tensor:
    checks.float_tensor(name, argument, value)
    if value.dtype is not other.dtype:
        checks.refuse(TypeError, name, argument, f"{other.dtype}, as {other_name}", value.dtype)
    if value.shape != other.shape or value.device != other.device:
        expected = f"{list(other.shape)} on {other.device}, as {other_name}"
        checks.refuse(ValueError, name, argument, expected, checks.describe(value))
    return value.detach()


def _check_options(name: str, dtype: Any, numerics: Any) -> None:
    if dtype not in _DTYPES:
        checks.one_of(name, "dtype", dtype, _DTYPES)
    if numerics not in checks.NUMERICS:
        checks.one_of(name, "numerics", numerics, checks.NUMERICS)


# ---- Registration


def scale_shape(shape: torch.Size, granularity: str) -> tuple[int, ...]:
    """The scales of a tensor of this shape."""
    groups = -(-shape[-1] // BLOCK)
    if granularity == "block":
        return (-(-shape[:-1].numel() // BLOCK), groups)
    return (*shape[:-1], 1 if granularity == "row" else groups)


def _empty(input: Tensor, dtype: str, granularity: str = "row") -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(input, dtype=CODES[dtype], memory_format=torch.contiguous_format)
    return codes, input.new_empty(scale_shape(input.shape, granularity), dtype=torch.float32)


def _quantize_fp8_fake(input: Tensor, granularity: str, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    values, scales = _empty(input, "fp8", granularity)
    shape = (input.shape[-1], input.shape[:-1].numel()) if transposed else (0,)
    return values, scales, values.new_empty(shape)


def _rms_norm_quantize_fake(
    hidden_states: Tensor, weight: Tensor, residual: Tensor | None, eps: float, numerics: str, dtype: str
) -> tuple[Tensor, Tensor, Tensor]:
    total = hidden_states.new_empty(0 if residual is None else hidden_states.shape)
    return *_empty(hidden_states, dtype), total


QUANTIZE_INT8 = Operator(
    "gemm",
    "quantize_int8",
    fwd_schema="(Tensor input) -> (Tensor codes, Tensor scales)",
    fwd_fake=lambda input: _empty(input, "int8"),
)
QUANTIZE_FP8 = Operator(
    "gemm",
    "quantize_fp8",
    fwd_schema="(Tensor input, str granularity, bool transposed)"
    " -> (Tensor values, Tensor scales, Tensor transposed_values)",
    fwd_fake=_quantize_fp8_fake,
)
RMS_NORM_QUANTIZE = Operator(
    "gemm",
    "rms_norm_quantize",
    fwd_schema="(Tensor hidden_states, Tensor weight, Tensor? residual, float eps, str numerics, str dtype)"
    " -> (Tensor codes, Tensor scales, Tensor total)",
    fwd_fake=_rms_norm_quantize_fake,
)
SWIGLU_QUANTIZE = Operator(
    "gemm",
    "swiglu_quantize",
    fwd_schema="(Tensor gate, Tensor up, str numerics, str dtype) -> (Tensor codes, Tensor scales)",
    fwd_fake=lambda gate, up, numerics, dtype: _empty(gate, dtype),
)

"""``requantize``: a weight straight to the panels of a quantised one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels.checks import describe, one_of, refuse
from m4ov_kernels.dispatch import KERNEL_DTYPES, native_extension, requested
from m4ov_kernels.gemm.options import KINDS
from m4ov_kernels.gemm.panels import PANEL, PLACES, Panels, lay_out
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight, validate
from m4ov_kernels.gemm.weights.fp8 import BLOCK, GRANULARITIES
from m4ov_kernels.gemm.weights.int4 import GROUP_SIZES, WHOLE_ROW
from m4ov_kernels.layout import DTYPES, as_rows, scratch

__all__ = ["requantize"]

_OP = "requantize"
_FP8 = {f"fp8-{granularity}": granularity for granularity in GRANULARITIES}
SCHEMES = ("int4", "int8", *_FP8)
_OWNERS = {"int4": "Int4Weight", "int8": "Int8Weight", "fp8": "Fp8Weight"}


@torch.no_grad()
def requantize(
    weight: Tensor, *, scheme: str, group_size: int = 128, paired: bool = False, out: Panels | None = None
) -> Panels:
    """The ``Panels`` of a quantised weight, in one pass: bit for bit those of ``Int8Weight.quantize(weight)``,
    ``Fp8Weight.quantize(weight, granularity=…)`` or ``Int4Weight.quantize(weight, group_size=…)``, whose rounding is
    told there. For weights that change while they serve: each step of reinforcement learning refreshes a quantised
    rollout with it.

    A plain function, not a registered operator: nothing differentiates or compiles it.

    Args:
        weight: ``[N, K]``, N and K at least 1; bfloat16, float16, float32 or float64, on the CPU; any strides.
        scheme: ``"int8"`` (a scale for each channel), ``"fp8-tensor"``, ``"fp8-channel"``, ``"fp8-block"`` (128 × 128),
            or ``"int4"`` (symmetric, round to nearest).
        group_size: of ``"int4"``: input features that share a scale, 32, 64, 128, or -1: all of a row.
        paired: panels in turn of the first half of the rows and of the second, ``[gate; up]``, for the epilogue
            ``"swiglu"``.
        out: what an earlier call with the same shape, dtype and options returned: its tensors are overwritten, and it
            is returned. After an error they hold nothing that means anything.

    Returns:
        Panels whose scales are of the weight's dtype if that is 16 bits wide (of fp8 always float32).

    Raises:
        TypeError: ``weight`` is not a floating-point, dense tensor, or ``out`` no ``Panels``.
        ValueError: a shape, device or option does not fit; ``weight`` has NaN, infinities or magnitudes past 7/8 of
            float32's range.

    Source: the quantisations': :mod:`m4ov_kernels.gemm.weights`.
    """
    if scheme not in SCHEMES:
        one_of(_OP, "scheme", scheme, SCHEMES)
    kind = scheme.partition("-")[0]
    if kind == "int4" and group_size not in (*GROUP_SIZES, WHOLE_ROW):
        refuse(ValueError, _OP, "group_size", "32, 64, 128 or -1 (a whole row)", repr(group_size))
    if not isinstance(weight, Tensor) or weight.dim() != 2 or 0 in weight.shape or weight.device.type != "cpu":
        kind_of = ValueError if isinstance(weight, Tensor) else TypeError
        refuse(kind_of, _OP, "weight", "a tensor [N, K] on the CPU, N and K at least 1", describe(weight))
    if paired and weight.shape[0] % 2:
        refuse(ValueError, _OP, "weight", "of an even number of rows, [gate; up]", list(weight.shape))
    if not _by_kernel(weight):
        made = lay_out(_quantized(weight, scheme, group_size), paired=paired)
        return made if out is None else _overwrite(out, made)
    panels = _empty(weight, scheme, group_size, paired)
    if out is not None:
        _check_out(out, panels)
        panels = out
    largest = _run(weight, panels, scheme)
    if not float(torch.tensor(largest, dtype=torch.int32).view(torch.float32)) <= validate.LARGEST:
        validate.matrix(_OWNERS[kind], weight)  # says so
    return panels


def _by_kernel(weight: Tensor) -> bool:
    extension, reason = native_extension()
    if weight.dtype not in KERNEL_DTYPES or weight.layout is not torch.strided:
        reason = f"its kernel is for dense bfloat16, float16 and float32; got {describe(weight)}"
    elif type(weight) not in (Tensor, torch.nn.Parameter):
        reason = "its kernel is for plain tensors, not for subclasses"
    if reason and requested() == "native":
        raise RuntimeError(f"{_OP}: backend 'native' was asked for, but {reason}")
    return extension is not None and not reason and requested() in (None, "native")


def _quantized(weight: Tensor, scheme: str, group_size: int) -> Int4Weight | Int8Weight | Fp8Weight:
    if scheme == "int4":
        return Int4Weight.quantize(weight, group_size=group_size)
    return Int8Weight.quantize(weight) if scheme == "int8" else Fp8Weight.quantize(weight, granularity=_FP8[scheme])


def _empty(weight: Tensor, scheme: str, group_size: int, paired: bool) -> Panels:
    """Panels of the right shapes, not yet written."""
    (N, K), kind = weight.shape, scheme.partition("-")[0]
    halves, places = 2 if paired else 1, PLACES[kind]
    panels, words = halves * -(-N // halves // PANEL), -(-K // places)
    group = {"int4": group_size, "fp8-block": BLOCK}.get(scheme, WHOLE_ROW)
    groups = 1 if group == WHOLE_ROW else -(-K // group)
    dtype = torch.float32 if kind == "fp8" or weight.dtype is torch.float32 else weight.dtype
    return Panels(
        kind,
        torch.empty((panels, words, PANEL, 2 if kind == "fp8" else 4), dtype=torch.uint8),
        torch.empty((panels, groups, PANEL), dtype=dtype),
        None,
        None,
        weight.shape,
        words * places if group == WHOLE_ROW else group,
        paired,
        GRANULARITIES.index(_FP8[scheme]) if kind == "fp8" else group_size if kind == "int4" else 0,
    )


def _run(weight: Tensor, panels: Panels, scheme: str) -> int:
    from m4ov_kernels import _C

    rows, stride = as_rows(weight.detach())
    N, K = weight.shape
    span = {"fp8-block": 1, "fp8-tensor": 2}.get(scheme, 0)
    _memory, address = scratch(4 * -(-N // BLOCK) * panels.scales.shape[1] if span else 0)
    largest: int = _C.requantize(
        panels.codes.data_ptr(),
        panels.scales.data_ptr(),
        address,
        rows.data_ptr(),
        N,
        K,
        stride,
        panels.group if panels.scales.shape[1] > 1 else 0,
        KINDS[panels.kind],
        span,
        panels.paired,
        DTYPES[panels.scales.dtype],
        DTYPES[rows.dtype],
        torch.get_num_threads(),
    )
    return largest


def _check_out(out: Any, expected: Panels) -> None:
    if not isinstance(out, Panels):
        refuse(TypeError, _OP, "out", "Panels", describe(out))

    if _form(out) != _form(expected) or not (out.codes.is_contiguous() and out.scales.is_contiguous()):
        refuse(ValueError, _OP, "out", f"contiguous Panels of {_form(expected)}", _form(out))


def _form(panels: Panels) -> tuple[Any, ...]:
    """All but the numbers."""
    others = [getattr(panels, name) for name in ("zeros", "order", "input_scale", "pre_quant_scale")]
    tensors = [describe(tensor) for tensor in (panels.codes, panels.scales, *others) if tensor is not None]
    return panels.kind, tuple(panels.shape), panels.group, panels.paired, panels.form, *tensors


def _overwrite(out: Panels, made: Panels) -> Panels:
    _check_out(out, made)
    out.codes.copy_(made.codes)
    out.scales.copy_(made.scales)
    return out

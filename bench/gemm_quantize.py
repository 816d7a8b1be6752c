"""Quantisation of activations, and of weights into panels: bound by memory; the limit is a copy of as many bytes as
must be read and written.

Results are compared with the definition to the bit before anything is timed, so peers need no judge: they are the
definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from m4ov_bench import cases, cases_quantize, gate, peers
from m4ov_bench.peers.base import compiled_peer
from m4ov_bench.row import Row
from m4ov_bench.session import Session, Subject, implementation_name, memory_bound, rows
from m4ov_kernels import quantize_fp8, quantize_int8, requantize, rms_norm, rms_norm_quantize, swiglu, swiglu_quantize
from m4ov_kernels.dispatch import OPERATORS, native_extension
from m4ov_kernels.gemm import reference
from m4ov_kernels.gemm.panels import Panels, lay_out
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight

EPS = 1e-6
_SETS = 3


def benchmark(session: Session) -> Iterator[Row]:
    for case in cases.QUANTIZE:
        if session.wants(case):
            yield from rows(session, subject(case, session.compiled if case.compiled else False))
    for weight in cases.REQUANTIZE:
        if session.wants(weight) and native_extension()[0] is not None:
            yield from rows(session, requantize_subject(weight))


def subject(case: cases_quantize.QuantizeCase, compiled: peers.Compiled) -> Subject:
    """One case, on PyTorch's default device."""
    implementation = OPERATORS[case.operator].select(torch.get_default_device(), case.dtype)
    inputs = [_inputs(case) for _ in range(_SETS)]
    raw = [_raw(case, tensors) for tensors in inputs]
    kernels = {}
    judged = _same(case, ours(case)(*inputs[0]), composed(case)(*inputs[0]))
    if implementation is not None:
        out = [_poisoned(implementation.fwd(*arguments)) for arguments in raw]
        for arguments, given in zip(raw, out, strict=True):
            implementation.fwd(*arguments, out=given)
        judged += _same(case, out[0], composed(case)(*inputs[0]), " (out=)")
        read = [x for x in raw[0] if isinstance(x, Tensor)]
        moved = sum(x.nbytes for x in (*read, *out[0]))
        copies = [[_bytes_of(arguments[0], given[0])] for arguments, given in zip(raw, out, strict=True)]
        kernels["forward"] = memory_bound(
            lambda index: implementation.fwd(*raw[index % _SETS], out=out[index % _SETS]),
            moved,
            5.0 * raw[0][0].numel(),
            copies,
        )
    eager = definition(case)
    return Subject(
        family="gemm",
        operator=case.operator,
        case=str(case),
        implementation=implementation_name(implementation),
        gate=judged,
        ours=ours(case),
        peers={"eager": eager, "torch.compile": compiled_peer(eager, compiled)},
        inputs=inputs,
        kernels=kernels,
    )


def _inputs(case: cases_quantize.QuantizeCase) -> tuple[Tensor, ...]:
    x = torch.randn(case.rows, case.width).to(case.dtype)
    if case.operator == "swiglu_quantize":
        return x, torch.randn(case.rows, case.width).to(case.dtype)
    if case.operator == "rms_norm_quantize":
        weight = torch.rand(case.width).add(0.5).to(case.dtype)
        return (x, weight, torch.randn_like(x)) if case.residual else (x, weight)
    return (x,)


def _raw(case: cases_quantize.QuantizeCase, tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    if case.operator == "rms_norm_quantize":
        x, weight, *residual = tensors
        return x, weight, residual[0] if residual else None, EPS, "hf", case.codes
    if case.operator == "swiglu_quantize":
        return *tensors, "hf", case.codes
    return (*tensors, case.granularity, case.transposed) if case.codes == "fp8" else tensors


def ours(case: cases_quantize.QuantizeCase) -> Callable[..., tuple[Tensor, ...]]:
    if case.operator == "rms_norm_quantize":
        return lambda x, weight, residual=None: rms_norm_quantize(
            x, weight, eps=EPS, residual=residual, dtype=case.codes
        )
    if case.operator == "swiglu_quantize":
        return lambda gates, up: swiglu_quantize(gates, up, dtype=case.codes)
    if case.codes == "int8":
        return quantize_int8
    return lambda x: quantize_fp8(x, case.granularity, case.transposed)


def composed(case: cases_quantize.QuantizeCase) -> Callable[..., tuple[Tensor, ...]]:
    """What ours must equal, to the bit: the definition, after our own operator where there is one before it."""

    def then(x: Tensor) -> tuple[Tensor, ...]:
        if case.codes == "int8":
            return reference.quantize_int8(x)
        return reference.quantize_fp8(x, case.granularity, case.transposed)[: 2 + case.transposed]

    def norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        if residual is None:
            return then(rms_norm(x, weight, eps=EPS))
        normed, total = rms_norm(x, weight, eps=EPS, residual=residual)
        return *then(normed), total

    if case.operator == "rms_norm_quantize":
        return norm
    return (lambda gates, up: then(swiglu(gates, up))) if case.operator == "swiglu_quantize" else then


def definition(case: cases_quantize.QuantizeCase) -> Callable[..., tuple[Tensor, ...]]:
    """In plain PyTorch."""
    if case.operator == "rms_norm_quantize":

        def norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
            return reference.rms_norm_quantize(x, weight, residual, EPS, "hf", case.codes)

        return norm
    if case.operator == "swiglu_quantize":
        return lambda gates, up: reference.swiglu_quantize(gates, up, "hf", case.codes)
    if case.codes == "int8":
        return reference.quantize_int8
    return lambda x: reference.quantize_fp8(x, case.granularity, case.transposed)


def _poisoned(results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Outputs like these, full of what no kernel makes."""
    out = []
    for tensor in results:
        made = torch.empty_like(tensor)
        (made.view(torch.int8) if tensor.element_size() == 1 else made).fill_(
            127 if tensor.dtype is torch.float8_e4m3fn else gate.poison_of(tensor)
        )
        out.append(made)
    return tuple(out)


def _same(
    case: cases_quantize.QuantizeCase, got: Sequence[Tensor], expected: Sequence[Tensor], note: str = ""
) -> gate.Gate:
    result = gate.Gate({})
    last = "sum" if case.residual else "transposed"
    for name, a, b in zip(("codes", "scales", last), got, expected, strict=False):
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[b.element_size()]
        result += gate.compare(name + note, a.view(bits), b.view(bits), b.view(bits))
    return result


def _bytes_of(source: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """As many bytes of both, for the copy that is the limit."""
    count = min(source.nbytes, sink.nbytes)
    return source.reshape(-1).view(torch.uint8)[:count], sink.view(-1).view(torch.uint8)[:count]


# ---- Weights into panels


def requantize_subject(case: cases_quantize.RequantizeCase) -> Subject:
    inputs = [((torch.randn(case.rows, case.width) * case.width**-0.5).to(case.dtype),) for _ in range(_SETS)]
    options = {"scheme": case.scheme, "group_size": case.group_size}
    out = [requantize(*tensors, **options) for tensors in inputs]
    expected = _plain(case)(inputs[0][0])
    names, judged = ("codes", "scales"), gate.Gate({})
    for name in names:
        a, b = (getattr(panels, name) for panels in (out[0], expected))
        judged += gate.compare(name, *(x.view(torch.uint8) for x in (a, b, b)))
    moved = inputs[0][0].nbytes + out[0].nbytes
    copies = [[_bytes_of(tensors[0], panels.codes)] for tensors, panels in zip(inputs, out, strict=True)]

    def kernel(index: int) -> None:
        requantize(*inputs[index % _SETS], **options, out=out[index % _SETS])

    return Subject(
        family="gemm",
        operator="requantize",
        case=str(case),
        implementation=f"native {native_extension()[0].isa()}",
        gate=judged,
        ours=lambda weight: requantize(weight, **options),
        peers={"eager": _plain(case)},
        inputs=inputs,
        kernels={"forward": memory_bound(kernel, moved, 4.0 * inputs[0][0].numel(), copies)},
    )


def _plain(case: cases_quantize.RequantizeCase) -> Callable[[Tensor], Panels]:
    """The quantised weight in plain PyTorch, then its panels."""

    def call(weight: Tensor) -> Panels:
        if case.scheme == "int8":
            return lay_out(Int8Weight.quantize(weight))
        if case.scheme == "int4":
            return lay_out(Int4Weight.quantize(weight, group_size=case.group_size))
        return lay_out(Fp8Weight.quantize(weight, granularity=case.scheme.partition("-")[2]))

    return call

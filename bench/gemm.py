"""What invariance costs: ``invariant_linear`` against ``F.linear`` (eager); the limit is ``torch.mm`` of the same. The
quantised linears are in ``gemm_quantized``, the quantisations in ``gemm_quantize``.

Attention and the head have no row here: their compiled CPU kernels always keep a row's bits, so that asking for it is
free (their own rows have PyTorch's attention and unfused heads beside them).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from m4ov_bench import cases, gate, gemm_quantize, gemm_quantized, invariant_model
from m4ov_bench.row import Row
from m4ov_bench.session import Kernel, Session, Subject, rows
from m4ov_kernels import invariant_linear
from m4ov_kernels.dispatch import native_extension
from m4ov_kernels.gemm.invariant import unavailable


def benchmark(session: Session) -> Iterator[Row]:
    yield from gemm_quantize.benchmark(session)
    for case in cases.LINEAR:
        if session.wants(case) and unavailable("cpu", case.dtype) is None:
            yield from rows(session, subject(case))
    if not session.quick and not session.only and unavailable("cpu", torch.bfloat16) is None:
        yield from invariant_model.benchmark(session)
    yield from gemm_quantized.benchmark(session)


def subject(case: cases.LinearCase) -> Subject:
    from m4ov_kernels.gemm import native

    inputs = [_inputs(case) for _ in range(3)]
    grads = [(torch.randn(case.rows, case.columns).to(case.dtype),) for _ in range(3)] if case.backward else None
    given = None if grads is None else grads[0]
    names = ["output", *(["grad_input", "grad_weight"] if case.backward else [])]
    exact_given = None if given is None else [x.double() for x in given]

    def made(function: Any, tensors: tuple[Tensor, ...], towards: Any) -> list[Tensor]:
        return gate.differentiated(function, tensors, towards) if case.backward else [function(*tensors)]

    judged = gate.compare_all(
        names,
        made(invariant_linear, inputs[0], given),
        made(F.linear, inputs[0], given),
        made(F.linear, tuple(x.double() for x in inputs[0]), exact_given),
    )
    plain = [tuple(x.detach() for x in tensors) for tensors in inputs]
    out = [torch.zeros(case.rows, case.columns, dtype=case.dtype) for _ in range(3)]
    bytes_moved = float(sum(x.nbytes for x in plain[0]) + out[0].nbytes)
    kernel = Kernel(
        lambda index: native.invariant_linear_fwd(*plain[index % 3], None, out=out[index % 3]),
        lambda index: torch.mm(plain[index % 3][0], plain[index % 3][1].t(), out=out[index % 3]),
        "torch.mm of the same",
        bytes_moved,
        2.0 * case.rows * case.width * case.columns,
        "FLOP",
    )
    return Subject(
        family="gemm",
        operator="invariant_linear",
        case=str(case),
        implementation=f"native {native_extension()[0].isa()}",
        gate=judged,
        ours=invariant_linear,
        peers={"eager": F.linear},
        inputs=inputs,
        grads=grads,
        definition=F.linear,
        kernels={"forward": kernel},
    )


def _inputs(case: cases.LinearCase) -> tuple[Tensor, ...]:
    shapes = ((case.rows, case.width), (case.columns, case.width))
    return tuple(
        (torch.randn(shape) * shape[1] ** -0.25).to(case.dtype).requires_grad_(case.backward) for shape in shapes
    )

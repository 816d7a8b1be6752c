"""``varlen_attention``: bound by matrix products; the limit is one large product of as many operations.

Counted are the pairs of a query and a key that it sees: two products of them forward, five backward (the scores again,
the gradients of probabilities, queries, keys and values). The exponentials are not counted; at a head dimension of 128
they take about a tenth of the forward's time, at 64 a fifth, so that 100% cannot be reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from m4ov_bench import cases, decoding, gate, measure, peers
from m4ov_bench.row import Row
from m4ov_bench.session import Kernel, Session, Subject, implementation_name, rows
from m4ov_kernels import varlen_attention
from m4ov_kernels.attention import VARLEN_ATTENTION, reference
from m4ov_kernels.dispatch import Implementation

_SIZE = 1024  # of the square matrices whose product is the limit


def benchmark(session: Session) -> Iterator[Row]:
    for case in cases.ATTENTION:
        if session.wants(case):
            yield from rows(session, subject(case, session.compiled if case.compiled else False))
    for one in cases.DECODING:
        if session.wants(one):
            yield from rows(session, decoding.subject(one))


def subject(case: cases.AttentionCase, compiled: peers.Compiled) -> Subject:
    """One case, on PyTorch's default device. Kernels of other packages have no preallocated outputs to measure."""
    implementation = VARLEN_ATTENTION.select(torch.get_default_device(), case.dtype)
    raw = implementation if implementation is not None and implementation.backend == "native" else None
    bounds = torch.tensor([0, *case.sizes]).cumsum(0).to(torch.int32)
    inputs = [_inputs(case) for _ in range(3)]
    grads = [(torch.randn(case.tokens, case.heads, case.dim).to(case.dtype),) for _ in range(3)]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, bounds, causal=case.causal)

    return Subject(
        family="attention",
        operator="varlen_attention",
        case=str(case),
        implementation=implementation_name(implementation),
        gate=check(case, ours, bounds, raw, inputs[0], grads[0]),
        ours=ours,
        peers=peers.varlen_attention(case.sizes, case.causal, compiled),
        inputs=inputs,
        grads=grads,
        definition=lambda q, k, v: reference.varlen_attention(q, k, v, bounds, None, case.causal, case.dim**-0.5),
        kernels={} if raw is None else kernels(case, bounds, raw, inputs, grads),
    )


def _inputs(case: cases.AttentionCase) -> tuple[Tensor, ...]:
    shapes = ((case.tokens, heads, case.dim) for heads in (case.heads, case.kv_heads, case.kv_heads))
    return tuple(torch.randn(shape).to(case.dtype).requires_grad_() for shape in shapes)


def check(
    case: cases.AttentionCase,
    call: Any,
    bounds: Tensor,
    implementation: Implementation | None,
    inputs: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
) -> gate.Gate:
    """The call with autograd, and the raw kernels into poisoned outputs, against PyTorch's attention and float64."""
    names = ["output", "grad_q", "grad_k", "grad_v"]
    scale = case.dim**-0.5

    def definition(*tensors: Tensor) -> Tensor:
        return reference.varlen_attention(*tensors, bounds, None, case.causal, scale)

    sdpa: Any = peers.varlen_attention(case.sizes, case.causal, False)["eager"]
    plain = gate.differentiated(sdpa, inputs, grads)
    exact = gate.differentiated(definition, [t.double() for t in inputs], [t.double() for t in grads])
    result = gate.compare_all(names, gate.differentiated(call, inputs, grads), plain, exact)
    if implementation is None:
        return result
    q, k, v = (tensor.detach() for tensor in inputs)
    options = (bounds, None, max(case.sizes), max(case.sizes), case.causal, scale)
    output, lse = gate.poisoned(q, torch.empty(2, case.heads, case.tokens))
    implementation.fwd(q, k, v, *options, out=(output, lse))
    out = gate.poisoned(q, k, v)
    implementation.bwd(grads[0], q, k, v, output, lse, *options, out=out)
    return result + gate.compare_all([f"{name} (out=)" for name in names], [output, *out], plain, exact)


def kernels(
    case: cases.AttentionCase,
    bounds: Tensor,
    implementation: Implementation,
    inputs: list[tuple[Tensor, ...]],
    grads: list[tuple[Tensor, ...]],
) -> dict[str, Kernel]:
    plain = [tuple(tensor.detach() for tensor in tensors) for tensors in inputs]
    options = (bounds, None, max(case.sizes), max(case.sizes), case.causal, case.dim**-0.5)
    saved = [implementation.fwd(*tensors, *options) for tensors in plain]
    out = tuple(torch.zeros_like(tensor) for tensor in plain[0])
    count = len(plain)

    def forward(index: int) -> None:
        implementation.fwd(*plain[index % count], *options, out=saved[index % count])

    def backward(index: int) -> None:
        number = index % count
        implementation.bwd(*grads[number], *plain[number], *saved[number], *options, out=out)

    left, right, product = (torch.randn(_SIZE, _SIZE).to(case.dtype) for _ in range(3))

    def limit(_: int) -> None:
        torch.mm(left, right, out=product)

    def bound(call: measure.Call, moved: int, products: int) -> Kernel:
        work = 2.0 * products * case.pairs * case.dim
        return Kernel(call, limit, "mm of as many operations", moved, work, "FLOP", work / (2.0 * _SIZE**3))

    # read q, k and v, write the output; read those and its gradient, write three gradients
    own, given = plain[0][0].nbytes, sum(tensor.nbytes for tensor in plain[0])
    return {"forward": bound(forward, given + own, 2), "backward": bound(backward, 2 * given + 2 * own, 5)}

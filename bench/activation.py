"""``swiglu``: bound by memory; the limit is a copy of as many bytes as it must read and write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from m4ov_bench import cases, gate, peers
from m4ov_bench.row import Row
from m4ov_bench.session import Kernel, Session, Subject, implementation_name, memory_bound, rows
from m4ov_kernels import swiglu
from m4ov_kernels.activation import SWIGLU, reference
from m4ov_kernels.dispatch import Implementation


def benchmark(session: Session) -> Iterator[Row]:
    for case in cases.ACTIVATION:
        if session.wants(case):
            yield from rows(session, subject(case, session.compiled if case.compiled else False))


def subject(case: cases.GatedCase, compiled: peers.Compiled) -> Subject:
    """One case, on PyTorch's default device."""
    implementation = SWIGLU.select(torch.get_default_device(), case.dtype)
    sets = 3
    inputs = [tuple(_random(case).requires_grad_() for _ in range(2)) for _ in range(sets)]
    grads = [(_random(case),) for _ in range(sets)]
    return Subject(
        family="activation",
        operator="swiglu",
        case=str(case),
        implementation=implementation_name(implementation),
        gate=check(case, ours(case), implementation, inputs[0], grads[0]),
        ours=ours(case),
        peers=peers.swiglu(compiled),
        inputs=inputs,
        grads=grads,
        definition=definition(case),
        kernels={} if implementation is None else kernels(case, implementation, inputs, grads),
    )


def ours(case: cases.GatedCase) -> Callable[..., Tensor]:
    return lambda gate, up: swiglu(gate, up, numerics=case.numerics)


def definition(case: cases.GatedCase) -> Callable[..., Tensor]:
    return lambda gate, up: reference.swiglu(gate, up, case.numerics)


def _random(case: cases.GatedCase) -> Tensor:
    return torch.randn(case.rows, case.width).to(case.dtype)


def check(
    case: cases.GatedCase,
    call: Callable[..., Any],
    implementation: Implementation | None,
    inputs: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
) -> gate.Gate:
    """The call with autograd, and the raw kernels into poisoned outputs, against plain PyTorch and float64."""
    names = ["output", "grad_gate", "grad_up"]

    plain = gate.differentiated(definition(case), inputs, grads)
    exact = gate.differentiated(definition(case), [t.double() for t in inputs], [t.double() for t in grads])
    result = gate.compare_all(names, gate.differentiated(call, inputs, grads), plain, exact)
    if implementation is None:
        return result
    gates, ups = (tensor.detach() for tensor in inputs)
    (output,) = gate.poisoned(gates)
    implementation.fwd(gates, ups, case.numerics, out=output)
    out = gate.poisoned(gates, ups)
    implementation.bwd(grads[0], gates, ups, case.numerics, out=out)
    return result + gate.compare_all([f"{name} (out=)" for name in names], [output, *out], plain, exact)


def kernels(
    case: cases.GatedCase,
    implementation: Implementation,
    inputs: list[tuple[Tensor, ...]],
    grads: list[tuple[Tensor, ...]],
) -> dict[str, Kernel]:
    plain = [tuple(tensor.detach() for tensor in tensors) for tensors in inputs]
    count = len(plain)
    out = [(torch.zeros_like(gates), torch.zeros_like(gates)) for gates, _ in plain]

    def forward(index: int) -> None:
        implementation.fwd(*plain[index % count], case.numerics, out=out[index % count][0])

    def backward(index: int) -> None:
        implementation.bwd(*grads[index % count], *plain[index % count], case.numerics, out=out[index % count])

    block = plain[0][0].numel() * plain[0][0].element_size()
    moved = {"forward": 3 * block, "backward": 5 * block}  # gate, up → output; gradient, gate, up → two gradients
    copies = {
        "forward": [[(gates, sink)] for (gates, _), (sink, _) in zip(plain, out, strict=True)],
        "backward": [list(zip(tensors, sinks, strict=True)) for tensors, sinks in zip(plain, out, strict=True)],
    }
    calls = {"forward": forward, "backward": backward}
    # an exponential counted as one: forward exp, add, divide, two products; backward those and seven more
    flops = {"forward": 5.0 * plain[0][0].numel(), "backward": 12.0 * plain[0][0].numel()}
    return {what: memory_bound(call, moved[what], flops[what], copies[what]) for what, call in calls.items()}

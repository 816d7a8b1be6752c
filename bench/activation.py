"""The activations: bound by memory; the limit is a copy of as many bytes as it must read and write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from m4ov_bench import cases, gate, peers
from m4ov_bench.row import Row
from m4ov_bench.session import Kernel, Session, Subject, implementation_name, memory_bound, rows
from m4ov_kernels import geglu, gelu, swiglu
from m4ov_kernels.activation import reference
from m4ov_kernels.dispatch import OPERATORS, Implementation


def benchmark(session: Session) -> Iterator[Row]:
    for case in cases.ACTIVATION:
        if session.wants(case):
            yield from rows(session, subject(case, session.compiled if case.compiled else False))


def subject(case: cases.GatedCase | cases.GeluCase, compiled: peers.Compiled) -> Subject:
    """One case, on PyTorch's default device."""
    if isinstance(case, cases.GeluCase):
        return _gelu_subject(case, compiled)
    implementation = OPERATORS[case.operator].select(torch.get_default_device(), case.dtype)
    sets = 3
    inputs = [tuple(_random(case).requires_grad_() for _ in range(2)) for _ in range(sets)]
    grads = [(_random(case),) for _ in range(sets)]
    return Subject(
        family="activation",
        operator=case.operator,
        case=str(case),
        implementation=implementation_name(implementation),
        gate=check(case, ours(case), implementation, inputs[0], grads[0]),
        ours=ours(case),
        peers={"swiglu": peers.swiglu, "geglu": peers.geglu}[case.operator](compiled),
        inputs=inputs,
        grads=grads,
        definition=definition(case),
        kernels={} if implementation is None else kernels(case, implementation, inputs, grads),
    )


def ours(case: cases.GatedCase) -> Callable[..., Tensor]:
    function = {"swiglu": swiglu, "geglu": geglu}[case.operator]
    return lambda gate, up: function(gate, up, numerics=case.numerics)


def definition(case: cases.GatedCase) -> Callable[..., Tensor]:
    if case.operator == "geglu":
        return lambda gate, up: reference.geglu(gate, up, "tanh", case.numerics)
    return lambda gate, up: reference.swiglu(gate, up, case.numerics)


def _options(case: cases.GatedCase) -> tuple[str, ...]:
    """Of the raw functions."""
    return ("tanh", case.numerics) if case.operator == "geglu" else (case.numerics,)


def _random(case: cases.GatedCase | cases.GeluCase) -> Tensor:
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
    implementation.fwd(gates, ups, *_options(case), out=output)
    out = gate.poisoned(gates, ups)
    implementation.bwd(grads[0], gates, ups, *_options(case), out=out)
    return result + gate.compare_all([f"{name} (out=)" for name in names], [output, *out], plain, exact)


def kernels(
    case: cases.GatedCase,
    implementation: Implementation,
    inputs: list[tuple[Tensor, ...]],
    grads: list[tuple[Tensor, ...]],
) -> dict[str, Kernel]:
    plain = [tuple(tensor.detach() for tensor in tensors) for tensors in inputs]
    count, options = len(plain), _options(case)
    out = [(torch.zeros_like(gates), torch.zeros_like(gates)) for gates, _ in plain]

    def forward(index: int) -> None:
        implementation.fwd(*plain[index % count], *options, out=out[index % count][0])

    def backward(index: int) -> None:
        implementation.bwd(*grads[index % count], *plain[index % count], *options, out=out[index % count])

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


def _gelu_subject(case: cases.GeluCase, compiled: peers.Compiled) -> Subject:
    implementation = OPERATORS["gelu"].select(torch.get_default_device(), case.dtype)
    sets = 3
    biases = [torch.randn(case.width).to(case.dtype).requires_grad_()] * case.bias
    inputs = [(_random(case).requires_grad_(), *biases) for _ in range(sets)]
    grads = [(_random(case),) for _ in range(sets)]

    def call(input: Tensor, bias: Tensor | None = None) -> Tensor:
        return gelu(input, bias=bias, approximate=case.approximate)

    def defined(input: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.gelu(input, bias, case.approximate)

    return Subject(
        family="activation",
        operator="gelu",
        case=str(case),
        implementation=implementation_name(implementation),
        gate=_gelu_check(case, call, defined, implementation, inputs[0], grads[0]),
        ours=call,
        peers=peers.gelu(case.approximate, compiled),
        inputs=inputs,
        grads=grads,
        definition=defined,
        kernels={} if implementation is None else _gelu_kernels(case, implementation, inputs, grads),
    )


def _gelu_check(
    case: cases.GeluCase,
    call: Callable[..., Tensor],
    defined: Callable[..., Tensor],
    implementation: Implementation | None,
    inputs: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
) -> gate.Gate:
    names = ["output", "grad_input", "grad_bias"][: 2 + case.bias]
    plain = gate.differentiated(defined, inputs, grads)
    exact = gate.differentiated(defined, [t.double() for t in inputs], [t.double() for t in grads])
    result = gate.compare_all(names, gate.differentiated(call, inputs, grads), plain, exact)
    if implementation is None:
        return result
    input, bias = inputs[0].detach(), inputs[1].detach() if case.bias else None
    (output,) = gate.poisoned(input)
    implementation.fwd(input, bias, case.approximate, out=output)
    out = gate.poisoned(input, input.new_empty(0) if bias is None else bias)
    implementation.bwd(grads[0], input, bias, case.approximate, case.bias, out=out)
    raw = [output, *out][: len(names)]
    return result + gate.compare_all([f"{name} (out=)" for name in names], raw, plain, exact)


def _gelu_kernels(
    case: cases.GeluCase,
    implementation: Implementation,
    inputs: list[tuple[Tensor, ...]],
    grads: list[tuple[Tensor, ...]],
) -> dict[str, Kernel]:
    plain = [(tensors[0].detach(), tensors[1].detach() if case.bias else None) for tensors in inputs]
    count, first = len(plain), plain[0][0]
    out = [(torch.zeros_like(x), x.new_zeros(case.width if case.bias else 0)) for x, _ in plain]

    def forward(index: int) -> None:
        implementation.fwd(*plain[index % count], case.approximate, out=out[index % count][0])

    def backward(index: int) -> None:
        place = index % count
        implementation.bwd(*grads[place], *plain[place], case.approximate, case.bias, out=out[place])

    block = first.numel() * first.element_size()
    copies = [[(x, sink)] for (x, _), (sink, _) in zip(plain, out, strict=True)]
    # input → output; gradient, input → gradient. An exponential counted as one operation.
    return {
        "forward": memory_bound(forward, 2 * block, 8.0 * first.numel(), copies),
        "backward": memory_bound(backward, 3 * block, 15.0 * first.numel(), copies),
    }

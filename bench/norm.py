"""The norms: bound by memory; the limit is a copy of as many bytes as it must read and write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from m4ov_bench import cases, gate, peers
from m4ov_bench.row import Row
from m4ov_bench.session import Kernel, Session, Subject, implementation_name, memory_bound, rows
from m4ov_kernels import layer_norm, rms_norm
from m4ov_kernels.dispatch import Implementation
from m4ov_kernels.norm import LAYER_NORM, RMS_NORM, reference

EPS = 1e-6


def benchmark(session: Session) -> Iterator[Row]:
    for case in cases.NORM:
        if session.wants(case):
            yield from rows(session, subject(case, session.compiled if case.compiled else False))


def subject(case: cases.NormCase, compiled: peers.Compiled) -> Subject:
    """One case, on PyTorch's default device."""
    if case.operator == "layer_norm":
        return _layer_norm_subject(case, compiled)
    implementation = RMS_NORM.select(torch.get_default_device(), case.dtype)
    sets = 3
    inputs = [_inputs(case) for _ in range(sets)]
    grads = [tuple(torch.randn_like(inputs[0][0]) for _ in range(1 + case.residual)) for _ in range(sets)]
    return Subject(
        family="norm",
        operator="rms_norm",
        case=str(case),
        implementation=implementation_name(implementation),
        gate=check(case, ours(case), implementation, inputs[0], grads[0]),
        ours=ours(case),
        peers=peers.rms_norm(inputs[0][1], EPS, case.residual, compiled),
        inputs=inputs,
        grads=grads,
        definition=definition(case),
        kernels={} if implementation is None else kernels(case, implementation, inputs, grads),
    )


def ours(case: cases.NormCase) -> Callable[..., Any]:
    def call(hidden_states: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        return rms_norm(hidden_states, weight, eps=EPS, residual=residual, numerics=case.numerics)

    return call


def definition(case: cases.NormCase) -> Callable[..., Any]:
    def call(hidden_states: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        outputs = reference.rms_norm(hidden_states, weight, EPS, residual, case.numerics)
        return outputs if case.residual else outputs[0]

    return call


def _inputs(case: cases.NormCase) -> tuple[Tensor, ...]:
    """hidden_states ``[rows, width]``, weight ``[width]``, and the residual where there is one."""
    hidden = [torch.randn(case.rows, case.width).to(case.dtype) for _ in range(1 + case.residual)]
    weight = torch.rand(case.width).add(0.5).to(case.dtype)
    return tuple(tensor.requires_grad_() for tensor in (hidden[0], weight, *hidden[1:]))


def check(
    case: cases.NormCase,
    call: Callable[..., Any],
    implementation: Implementation | None,
    inputs: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
) -> gate.Gate:
    """The call with autograd, and the raw kernels into poisoned outputs, against plain PyTorch and float64."""
    names = ["normed", "sum"][: 1 + case.residual] + ["grad_hidden_states", "grad_weight", "grad_residual"][
        : len(inputs)
    ]

    plain = gate.differentiated(definition(case), inputs, grads)
    exact = gate.differentiated(definition(case), [t.double() for t in inputs], [t.double() for t in grads])
    result = gate.compare_all(names, gate.differentiated(call, inputs, grads), plain, exact)
    if implementation is None:
        return result
    hidden_states, weight, *residual = (tensor.detach() for tensor in inputs)
    out = gate.poisoned(hidden_states, hidden_states if residual else hidden_states.new_empty(0), _rstd(hidden_states))
    implementation.fwd(hidden_states, weight, residual[0] if residual else None, EPS, case.numerics, out=out)
    normed, total, rstd = out
    out = gate.poisoned(hidden_states, weight)
    summed = total if residual else hidden_states
    grad_sum = grads[1] if residual else None
    implementation.bwd(grads[0], grad_sum, summed, weight, rstd, case.numerics, True, out=out)
    raw = [normed, total, *out, out[0]] if residual else [normed, *out]
    return result + gate.compare_all([f"{name} (out=)" for name in names], raw, plain, exact)


def kernels(
    case: cases.NormCase,
    implementation: Implementation,
    inputs: list[tuple[Tensor, ...]],
    grads: list[tuple[Tensor, ...]],
) -> dict[str, Kernel]:
    plain = [tuple(tensor.detach() for tensor in tensors) for tensors in inputs]
    first, count = plain[0][0], len(plain)
    block = first.numel() * first.element_size()
    forward_out = [
        (torch.zeros_like(first), torch.zeros_like(first) if case.residual else first.new_empty(0), _rstd(first))
        for _ in plain
    ]
    backward_out = [(torch.zeros_like(first), torch.zeros_like(plain[0][1])) for _ in plain]

    def forward(index: int) -> None:
        hidden_states, weight, *residual = plain[index % count]
        out = forward_out[index % count]
        implementation.fwd(hidden_states, weight, residual[0] if residual else None, EPS, case.numerics, out=out)

    for index in range(count):
        forward(index)  # the backward needs every set's rstd

    def backward(index: int) -> None:
        hidden_states, weight, *residual = plain[index % count]
        _, total, rstd = forward_out[index % count]
        grad_normed, *grad_sum = grads[index % count]
        implementation.bwd(
            grad_normed,
            grad_sum[0] if residual else None,
            total if residual else hidden_states,
            weight,
            rstd,
            case.numerics,
            True,
            out=backward_out[index % count],
        )

    # read x (and the residual), write y (and the sum); read dy, x (and the sum's gradient), write dx
    moved = {"forward": block * (4 if case.residual else 2), "backward": block * (4 if case.residual else 3)}
    copies = {
        "forward": [[(tensors[0], out[0])] for tensors, out in zip(plain, forward_out, strict=True)],
        "backward": [[(grad[0], out[0])] for grad, out in zip(grads, backward_out, strict=True)],
    }
    calls = {"forward": forward, "backward": backward}
    # forward: square and add, two products (and the sum); backward: two dot products, then dx and dw
    flops = {"forward": (4.0 + case.residual) * first.numel(), "backward": (10.0 + case.residual) * first.numel()}
    return {what: memory_bound(call, moved[what], flops[what], copies[what]) for what, call in calls.items()}


def _rstd(hidden_states: Tensor) -> Tensor:
    return torch.zeros(hidden_states.shape[0])


def _layer_norm_subject(case: cases.NormCase, compiled: peers.Compiled) -> Subject:
    implementation = LAYER_NORM.select(torch.get_default_device(), case.dtype)
    sets = 3
    inputs = []
    for _ in range(sets):
        hidden_states, weight, *residual = _inputs(case)
        inputs.append((hidden_states, weight, torch.randn(case.width).to(case.dtype).requires_grad_(), *residual))
    grads = [tuple(torch.randn_like(inputs[0][0]) for _ in range(1 + case.residual)) for _ in range(sets)]

    def call(hidden_states: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Any:
        return layer_norm(hidden_states, weight, bias, eps=EPS, residual=residual, numerics=case.numerics)

    def defined(hidden_states: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Any:
        outputs = reference.layer_norm(hidden_states, weight, bias, residual, EPS, case.numerics)
        return outputs if case.residual else outputs[0]

    names = ["normed", "sum"][: 1 + case.residual]
    names += ["grad_hidden_states", "grad_weight", "grad_bias", "grad_residual"][: 3 + case.residual]
    plain = gate.differentiated(defined, inputs[0], grads[0])
    exact = gate.differentiated(defined, [t.double() for t in inputs[0]], [t.double() for t in grads[0]])
    green = gate.compare_all(names, gate.differentiated(call, inputs[0], grads[0]), plain, exact)
    kernels = {}
    if implementation is not None:
        kernels, made = _layer_norm_kernels(case, implementation, inputs, grads)
        raw = [*made[: 1 + case.residual], *made[2:], *([made[2]] if case.residual else [])]
        green += gate.compare_all([f"{name} (out=)" for name in names], raw, plain, exact)
    return Subject(
        family="norm",
        operator="layer_norm",
        case=str(case),
        implementation=implementation_name(implementation),
        gate=green,
        ours=call,
        peers=peers.layer_norm(EPS, case.residual, compiled),
        inputs=inputs,
        grads=grads,
        definition=defined,
        kernels=kernels,
    )


def _layer_norm_kernels(
    case: cases.NormCase,
    implementation: Implementation,
    inputs: list[tuple[Tensor, ...]],
    grads: list[tuple[Tensor, ...]],
) -> tuple[dict[str, Kernel], list[Tensor]]:
    """The kernels, and what they left in poisoned outputs: normed, sum, and the three gradients."""
    plain = [tuple(tensor.detach() for tensor in tensors) for tensors in inputs]
    first, count = plain[0][0], len(plain)
    empty = first.new_empty(0)
    forward_out, backward_out = [], []
    for hidden_states, weight, bias, *_ in plain:
        total = hidden_states if case.residual else empty
        forward_out.append(gate.poisoned(hidden_states, total, _rstd(first), _rstd(first)))
        backward_out.append(gate.poisoned(hidden_states, weight, bias))

    def forward(index: int) -> None:
        hidden_states, weight, bias, *residual = plain[index % count]
        added, out = residual[0] if residual else None, forward_out[index % count]
        implementation.fwd(hidden_states, weight, bias, added, EPS, case.numerics, out=out)

    def backward(index: int) -> None:
        hidden_states, weight, *_ = plain[index % count]
        _, total, mean, rstd = forward_out[index % count]
        grad_normed, *grad_sum = grads[index % count]
        x, grad_total = (total, grad_sum[0]) if case.residual else (hidden_states, None)
        implementation.bwd(grad_normed, grad_total, x, weight, mean, rstd, True, True, out=backward_out[index % count])

    for index in range(count):
        forward(index)
        backward(index)
    made = [*forward_out[0][:2], *backward_out[0]]
    block = first.numel() * first.element_size()
    moved = {"forward": block * (4 if case.residual else 2), "backward": block * (4 if case.residual else 3)}
    copies = {
        "forward": [[(tensors[0], out[0])] for tensors, out in zip(plain, forward_out, strict=True)],
        "backward": [[(grad[0], out[0])] for grad, out in zip(grads, backward_out, strict=True)],
    }
    calls = {"forward": forward, "backward": backward}
    # forward: sum, distance, square and add, three to scale (and the sum); backward: two dot products, dx, dw and db
    flops = {"forward": (8.0 + case.residual) * first.numel(), "backward": (14.0 + case.residual) * first.numel()}
    found = {what: memory_bound(call, moved[what], flops[what], copies[what]) for what, call in calls.items()}
    return found, [tensor.clone() for tensor in made]

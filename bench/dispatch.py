"""What a front door costs: argument checks, the choice of an implementation, and the road to autograd.

Measured on tensors of one row, where the kernel itself is nothing: the public function minus a plain Python function
that calls the same raw kernel with the same arguments. With gradients: the forward records a graph, the plain
function still does not, so the difference is the whole price of being differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from m4ov_bench import measure
from m4ov_bench.gate import Gate, compare
from m4ov_bench.row import Row
from m4ov_bench.session import Session, Subject, implementation_name, row
from m4ov_kernels import linear_cross_entropy, rms_norm, swiglu
from m4ov_kernels.dispatch import FUNCTIONS, Implementation

CPU = torch.device("cpu")


def benchmark(session: Session) -> Iterator[Row]:
    for name, prepare in _OPERATORS.items():
        implementation = FUNCTIONS[name].select(CPU, torch.bfloat16)
        if implementation is None:
            continue  # the reference is called without any dispatch
        public, plain, tensors = prepare(implementation)
        wanting = [tensor.clone().requires_grad_() for tensor in tensors]
        session.say(f"{name}: overhead of a call")
        with torch.no_grad():
            times = measure.microseconds(
                {"public": lambda p=public, t=tensors: p(*t), "plain": lambda f=plain, t=tensors: f(*t)}, session.effort
            )
        yield _row(session, name, implementation, "no gradients", times, public(*tensors), plain(*tensors))
        times = measure.microseconds(
            {"public": lambda p=public, t=wanting: p(*t), "plain": lambda f=plain, t=tensors: f(*t)}, session.effort
        )
        yield _row(session, name, implementation, "forward with gradients", times, public(*wanting), plain(*tensors))


def _norm(implementation: Implementation) -> tuple[Callable[..., Any], Callable[..., Any], list[torch.Tensor]]:
    tensors = [torch.randn(1, 16).bfloat16(), torch.rand(16).bfloat16()]

    def public(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, weight, eps=1e-6)  # type: ignore[return-value]

    def plain(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return implementation.fwd(hidden_states, weight, None, 1e-6, "hf")[0]

    return public, plain, tensors


def _gated(implementation: Implementation) -> tuple[Callable[..., Any], Callable[..., Any], list[torch.Tensor]]:
    tensors = [torch.randn(1, 16).bfloat16() for _ in range(2)]
    return swiglu, lambda gate, up: implementation.fwd(gate, up, "hf"), tensors


def _head(implementation: Implementation) -> tuple[Callable[..., Any], Callable[..., Any], list[torch.Tensor]]:
    tensors = [torch.randn(1, 16).bfloat16(), torch.randn(32, 16).bfloat16()]
    target = torch.tensor([3])

    def public(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(input, weight, target, reduction="none")

    def plain(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        options = (1.0, 0.0, -100, None, True, False, False, 0, 0, 32, 0, "linear_cross_entropy")
        return -implementation.fwd(input, weight, target, None, None, *options)[0]

    return public, plain, tensors


_OPERATORS = {"rms_norm": _norm, "swiglu": _gated, "linear_cross_entropy": _head}


def _row(
    session: Session,
    name: str,
    implementation: Implementation,
    what: str,
    times: dict[str, measure.Times],
    ours: torch.Tensor,
    plain: torch.Tensor,
) -> Row:
    """Green when the front door gives the bits of the raw kernel."""
    public, direct = times["public"], times["plain"]
    gate: Gate = compare("output", ours.detach(), plain, plain.double())
    if not torch.equal(ours.detach(), plain):
        gate += Gate({}, "the front door's bits are not the raw kernel's")
    overhead = public.less(direct)
    subject = Subject(
        family="dispatch",
        operator=name,
        case="1 row",
        implementation=implementation_name(implementation),
        gate=gate,
        ours=lambda: None,
        peers={},
        inputs=(),
    )
    if not gate.green:
        return row(session, subject, f"overhead, {what}")
    return row(
        session,
        subject,
        f"overhead, {what}",
        seconds=overhead,
        disturbed=public.disturbed,
        note=f"a call {public.seconds * 1e6:.1f} µs, a plain function {direct.seconds * 1e6:.1f} µs",
    )

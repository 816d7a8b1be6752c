"""``linear_kl``: bound by matrix products; the limit is those products alone (``products.py``): the logits of two heads
forward, and again backward, with a gradient each for hidden states and weight; of the symmetric one, whose sum takes
both normalisers, forward twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from m4ov_bench import cases, gate, memory
from m4ov_bench.kl_loss import definition, eager, ours
from m4ov_bench.peers.base import Absent, Peer, compiled_peer
from m4ov_bench.products import fastest_chunk, products
from m4ov_bench.row import Row
from m4ov_bench.session import OURS, Kernel, Session, Subject, implementation_name, rows
from m4ov_kernels.dispatch import Implementation
from m4ov_kernels.head import LINEAR_KL

CPU = torch.device("cpu")
_JUDGED = 32768  # words


def benchmark(session: Session) -> Iterator[Row]:
    for case in cases.KL:
        if session.wants(case):
            yield from rows(session, subject(session, case))


def subject(session: Session, case: cases.KlCase) -> Subject:
    implementation = LINEAR_KL.select(CPU, case.dtype)
    inputs = [make_inputs(case) for _ in range(2)]
    used: dict[str, float | None] = {}
    if case.memory and not session.quick:
        for name in (OURS, "eager"):
            session.say(f"linear_kl {case}: memory of {name}")
            used[name] = memory.extra_mib(name, case)
    names = ["loss", "grad_hidden_states", "grad_weight"]
    # A float64 head of 150,000 words, its gradient and its logits are more than a small machine has.
    hidden, weight, other, other_weight = inputs[0]
    first = (hidden, weight[:_JUDGED].detach().requires_grad_(), other, other_weight[:_JUDGED])
    results = [
        gate.differentiated(partial(function, case.kind), tensors, None)
        for function, tensors in (
            (ours, first),
            (definition, first),
            (definition, tuple(tensor.double() for tensor in first)),
        )
    ]
    return Subject(
        family="head",
        operator="linear_kl",
        case=str(case),
        implementation=implementation_name(implementation),
        gate=gate.compare_all(names, *results),
        ours=partial(ours, case.kind),
        peers=peers(session, case),
        inputs=inputs,
        definition=partial(definition, case.kind),
        kernels={} if implementation is None else kernels(session, case, implementation, inputs),
        memory=used,
    )


def make_inputs(case: cases.KlCase) -> tuple[Tensor, ...]:
    """hidden_states ``[M, D]``, weight ``[V, D]``, and those of the reference, near them; logits have a standard
    deviation of about 2."""
    hidden, near = torch.randn(case.rows, case.width), torch.randn(case.rows, case.width)
    weight = torch.randn(case.vocabulary, case.width).mul_(2 * case.width**-0.5).to(case.dtype)
    reference = (hidden + 0.2 * near).to(case.dtype), weight.clone()
    return hidden.to(case.dtype).requires_grad_(), weight.requires_grad_(), *reference


def peers(session: Session, case: cases.KlCase) -> dict[str, Peer]:
    if case.vocabulary > _JUDGED:
        return {"eager": Absent("cannot be judged in float64 here")}
    plain: Callable[..., Tensor] = partial(eager, case.kind)
    return {"eager": plain, "torch.compile": compiled_peer(plain, session.compiled if case.compiled else False)}


def kernels(
    session: Session, case: cases.KlCase, implementation: Implementation, inputs: list[tuple[Tensor, ...]]
) -> dict[str, Kernel]:
    plain = [tuple(tensor.detach() for tensor in tensors) for tensors in inputs]
    count, (hidden, weight, *_) = len(plain), plain[0]
    options = (None, None, None)  # biases and mask
    more = (case.kind, 1.0, None, False)
    grad = torch.full((case.rows,), 1.0 / case.rows)
    gradients = (torch.zeros_like(hidden), torch.zeros_like(weight), hidden.new_empty(0))

    def forward(index: int) -> Tensor:
        found: tuple[Tensor, Tensor] = implementation.fwd(*plain[index % count], *options, *more)
        return found[1]

    def both(index: int) -> None:
        normalizer = forward(index)
        assert implementation.bwd is not None
        given = (grad, *plain[index % count], *options, normalizer)
        implementation.bwd(*given, *more, True, True, False, out=gradients)

    sizes = (case.rows, case.width, case.vocabulary, case.dtype)
    chunk = fastest_chunk(*sizes, session.quick)
    one = products(*sizes, chunk, 1)
    four = products(*sizes, chunk, 4)
    passes = 4 if case.kind == "jsd" else 2

    def limit(count: int, backward: bool) -> Callable[[int], None]:
        def call(index: int) -> None:
            for _ in range(count):
                one(index)
            if backward:
                four(index)

        return call

    made: dict[str, Kernel] = {}
    for what, call, backward in (("forward", forward, False), ("forward + backward", both, True)):
        many = passes + 4 * backward
        # Four products: the policy's logits and its two gradients, and as many as the reference's logits again.
        made[what] = Kernel(
            call,
            limit(passes, backward),
            f"{many} mm by {chunk} words",
            2 * (weight.nbytes + hidden.nbytes) * (2 if backward else 1),
            many * 2.0 * case.rows * case.width * case.vocabulary,
            "FLOP",
        )
    return made

"""``linear_logprob``: bound by matrix products; the limit is those products alone (``products.py``): one
forward, four both ways (logits, logits again, and a gradient each for hidden states and weight).

The compiled kernel's own products are a little faster than those of oneDNN, and its logits are float32: what an unfused
model with bf16 logits computes is judged wrong where that costs more than the rule allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from m4ov_bench import cases, gate, memory
from m4ov_bench.logprob_loss import ENTROPY, IGNORE, definition, eager, ours
from m4ov_bench.peers.base import Absent, Peer, compiled_peer
from m4ov_bench.products import fastest_chunk, products
from m4ov_bench.row import Row
from m4ov_bench.session import OURS, Kernel, Session, Subject, implementation_name, rows
from m4ov_kernels.dispatch import Implementation
from m4ov_kernels.head import LINEAR_LOGPROB

CPU = torch.device("cpu")
_JUDGED = 32768  # words


def benchmark(session: Session) -> Iterator[Row]:
    for case in cases.LOGPROB:
        if session.wants(case):
            yield from rows(session, subject(session, case))


def subject(session: Session, case: cases.LogprobCase) -> Subject:
    implementation = LINEAR_LOGPROB.select(CPU, case.dtype)
    inputs = [_inputs(case) for _ in range(2)]
    exact = partial(definition, case.entropy)
    used: dict[str, float | None] = {}
    if case.memory and not session.quick:
        for name in (OURS, "eager"):
            session.say(f"linear_logprob {case}: memory of {name}")
            used[name] = memory.extra_mib(name, case)
    names = ["loss", "grad_hidden_states", "grad_weight"]
    hidden, weight, targets = judged(inputs[0])
    results = [
        gate.differentiated(function, tensors, None)
        for function, tensors in (
            (partial(ours, case.entropy), (hidden, weight, targets)),
            (exact, (hidden, weight, targets)),
            (exact, (hidden.double(), weight.double(), targets)),
        )
    ]
    return Subject(
        family="head",
        operator="linear_logprob",
        case=str(case),
        implementation=implementation_name(implementation),
        gate=gate.compare_all(names, *results),
        ours=partial(ours, case.entropy),
        peers=peers(session, case),
        inputs=inputs,
        definition=exact,
        kernels={} if implementation is None else kernels(session, case, implementation, inputs),
        memory=used,
    )


def _inputs(case: cases.LogprobCase) -> tuple[Tensor, ...]:
    """hidden_states ``[M, D]``, weight ``[V, D]``, targets ``[M]``; logits have a standard deviation of about 2."""
    hidden = torch.randn(case.rows, case.width).to(case.dtype)
    weight = torch.randn(case.vocabulary, case.width).mul_(2 * case.width**-0.5).to(case.dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), cases.targets(case)


def judged(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same rows over the first words alone, as leaves: a float64 head of 150,000 words, its gradient and its logits
    are more than a small machine has."""
    hidden, weight, targets = tensors
    weight = weight[:_JUDGED].detach().requires_grad_()
    return hidden, weight, torch.where(targets == IGNORE, IGNORE, targets % weight.shape[0])


def peers(session: Session, case: cases.LogprobCase) -> dict[str, Peer]:
    """Functions of ``(hidden_states, weight, targets)`` that give the loss."""
    if case.vocabulary > _JUDGED:
        return {"eager": Absent("cannot be judged in float64 here")}
    plain: Callable[..., Tensor] = partial(eager, case.entropy)
    return {"eager": plain, "torch.compile": compiled_peer(plain, session.compiled if case.compiled else False)}


def kernels(
    session: Session, case: cases.LogprobCase, implementation: Implementation, inputs: list[tuple[Tensor, ...]]
) -> dict[str, Kernel]:
    plain = [tuple(tensor.detach() for tensor in tensors) for tensors in inputs]
    count, (hidden, weight, targets) = len(plain), plain[0]
    forward_options = (None, None, 1.0, 0.0, IGNORE, None, False, case.entropy, False, 0, 0, case.vocabulary, 0)
    backward_options = (1.0, 0.0, IGNORE, None, False, 0, case.vocabulary, True, True, False)
    grad = torch.full((case.rows,), -1.0 / case.rows)
    grads = (grad, None, grad * ENTROPY if case.entropy else None, None)
    gradients = (torch.zeros_like(hidden), torch.zeros_like(weight), hidden.new_empty(0))

    def forward(index: int) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = implementation.fwd(*plain[index % count], *forward_options)
        return found

    def both(index: int) -> None:
        found = forward(index)
        assert implementation.bwd is not None
        saved = (found[6], found[2], found[7])  # normalizer, entropy, kept logits
        implementation.bwd(*plain[index % count], None, None, *saved, *grads, *backward_options, out=gradients)

    rows_left = max(1, int((targets != IGNORE).sum()))
    chunk = fastest_chunk(rows_left, case.width, case.vocabulary, case.dtype, session.quick)
    return {
        what: Kernel(
            call,
            products(rows_left, case.width, case.vocabulary, case.dtype, chunk, many),
            f"{many} mm by {chunk} words",
            (weight.nbytes + hidden.nbytes) * (1 if many == 1 else 3),
            many * 2.0 * rows_left * case.width * case.vocabulary,
            "FLOP",
        )
        for what, call, many in (("forward", forward, 1), ("forward + backward", both, 4))
    }

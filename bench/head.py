"""``linear_cross_entropy``: bound by matrix products; the limit is those products alone, by chunks of the vocabulary.

Without whole logits, forward and backward take four products: logits, logits again, and a gradient each for the hidden
states and the weight; with logits kept from one to the other, three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from m4ov_bench import cases, gate, kl, logprob, memory, peers, plots
from m4ov_bench.products import fastest_chunk, products
from m4ov_bench.row import Peer, Row
from m4ov_bench.runtimes import Inference
from m4ov_bench.session import OURS, Kernel, Session, Subject, implementation_name, rows
from m4ov_kernels import linear_cross_entropy
from m4ov_kernels.dispatch import Implementation
from m4ov_kernels.head import LINEAR_CROSS_ENTROPY, reference
from m4ov_kernels.head.chunked import CPU_KEPT_BYTES, room_for_logits

CPU = torch.device("cpu")
IGNORE = -100


def benchmark(session: Session) -> Iterator[Row]:
    for case in cases.HEAD:
        if session.wants(case):
            yield from rows(session, subject(session, case))
    yield from logprob.benchmark(session)
    yield from kl.benchmark(session)
    if not session.quick:
        yield from _memory_by_tokens(session)


def _memory_by_tokens(session: Session) -> Iterator[Row]:
    """How memory grows with the tokens, and that ours does not where logits are not kept."""
    for case in cases.HEAD_MEMORY:
        used: dict[str, float | None] = {}
        for name in (OURS, "eager", "F.linear_cross_entropy"):
            session.say(f"linear_cross_entropy {case}: memory of {name}")
            try:
                used[name] = memory.extra_mib(name, case)
            except RuntimeError as error:
                if name == OURS:
                    raise
                session.say(str(error))
        yield Row(
            family="head",
            operator="linear_cross_entropy",
            case=f"D {case.width}, V {case.vocabulary} bf16",
            what=f"{plots.MEMORY}, {case.rows} tokens",
            implementation=implementation_name(LINEAR_CROSS_ENTROPY.select(CPU, case.dtype)),
            machine=session.machine,
            green=True,
            errors={},
            memory_mib=used.pop(OURS),
            tokens=case.rows,
            peers={name: Peer(memory_mib=value, absent="memory alone") for name, value in used.items()},
        )


def subject(session: Session, case: cases.HeadCase) -> Subject:
    implementation = LINEAR_CROSS_ENTROPY.select(CPU, case.dtype)
    inputs = [_inputs(case) for _ in range(2)]
    others = peers.linear_cross_entropy(case.rows, session.compiled if case.compiled else False, session.quick)
    ours = partial(linear_cross_entropy, keep_logits_bytes=case.kept)
    used: dict[str, float | None] = {}
    if case.memory and not session.quick:
        for name in (OURS, *(name for name, peer in others.items() if not isinstance(peer, (peers.Absent, Inference)))):
            session.say(f"linear_cross_entropy {case}: memory of {name}")
            used[name] = memory.extra_mib(name, case)
    return Subject(
        family="head",
        operator="linear_cross_entropy",
        case=str(case),
        implementation=implementation_name(implementation),
        gate=check(case, ours, implementation, inputs[0]),
        ours=ours,
        peers=others,
        inputs=inputs,
        definition=definition,
        kernels={} if implementation is None else kernels(session, case, implementation, inputs),
        memory=used,
    )


def _of_rows(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return reference.linear_cross_entropy(input, weight, target, None, IGNORE, 0.0)


def definition(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The mean loss in plain PyTorch, logits whole."""
    return _of_rows(input, weight, target).sum() / (target != IGNORE).sum()


def _inputs(case: cases.HeadCase) -> tuple[Tensor, ...]:
    """input ``[M, D]``, linear_weight ``[V, D]``, target ``[M]``; logits have a standard deviation of about 2."""
    input = torch.randn(case.rows, case.width).to(case.dtype)
    weight = torch.randn(case.vocabulary, case.width).mul_(2 * case.width**-0.5).to(case.dtype)
    return input.requires_grad_(), weight.requires_grad_(), cases.targets(case)


def check(
    case: cases.HeadCase,
    call: Callable[..., Any],
    implementation: Implementation | None,
    inputs: tuple[Tensor, ...],
) -> gate.Gate:
    """The call with autograd, and the raw kernels into poisoned outputs, against plain PyTorch and float64."""
    input, weight, target = inputs
    labelled = int((target != IGNORE).sum())

    doubled = (input.double(), weight.double(), target)
    names = ["loss", "grad_input", "grad_weight"]
    plain = gate.differentiated(definition, inputs, None)
    exact = gate.differentiated(definition, doubled, None)
    result = gate.compare_all(names, gate.differentiated(call, inputs, None), plain, exact)
    if implementation is None:
        return result
    input, weight = input.detach(), weight.detach()
    kept = CPU_KEPT_BYTES if case.kept is None else case.kept
    room = room_for_logits(case.rows, case.vocabulary, input.element_size(), None, kept)
    loss, *saved = gate.poisoned(torch.empty(case.rows), torch.empty(case.rows, 2), input.new_empty(room))
    implementation.fwd(input, weight, target, None, IGNORE, 0.0, None, kept, out=(loss, *saved))
    out = (*gate.poisoned(input, weight), input.new_empty(0))
    grad_loss = torch.where(target == IGNORE, 0.0, 1.0 / labelled)
    options = (IGNORE, 0.0, None, True, True, False)
    implementation.bwd(grad_loss, input, weight, target, None, *saved, *options, out=out)
    with torch.no_grad():
        plain[0], exact[0] = _of_rows(input, weight, target), _of_rows(input.double(), weight.double(), target)
    return result + gate.compare_all([f"{name} (out=)" for name in names], [loss, *out[:2]], plain, exact)


def kernels(
    session: Session, case: cases.HeadCase, implementation: Implementation, inputs: list[tuple[Tensor, ...]]
) -> dict[str, Kernel]:
    plain = [tuple(tensor.detach() for tensor in tensors) for tensors in inputs]
    count, first = len(plain), plain[0]
    kept = CPU_KEPT_BYTES if case.kept is None else case.kept
    forward_out = implementation.fwd(*first, None, IGNORE, 0.0, None, 0)
    training_out = implementation.fwd(*first, None, IGNORE, 0.0, None, kept)
    backward_out = (torch.zeros_like(first[0]), torch.zeros_like(first[1]), first[0].new_empty(0))
    grad_loss = [torch.where(target == IGNORE, 0.0, 1.0 / case.rows) for *_, target in plain]
    options = (IGNORE, 0.0, None, True, True, False)

    def forward(index: int) -> None:
        implementation.fwd(*plain[index % count], None, IGNORE, 0.0, None, 0, out=forward_out)

    def both(index: int) -> None:
        loss_grad, tensors = grad_loss[index % count], plain[index % count]
        implementation.fwd(*tensors, None, IGNORE, 0.0, None, kept, out=training_out)
        implementation.bwd(loss_grad, *tensors, None, *training_out[1:], *options, out=backward_out)

    rows_left = max(1, int((first[2] != IGNORE).sum()))
    chunk = fastest_chunk(rows_left, case.width, case.vocabulary, case.dtype, session.quick)
    one = 2.0 * rows_left * case.width * case.vocabulary
    whole = kept >= rows_left * case.vocabulary * first[0].element_size()
    # Logits once or twice, and a gradient each for the hidden states and the weight.
    parts = (("forward", forward, 1), ("forward + backward", both, 3 if whole else 4))
    weights, hidden = first[1].nbytes, first[0].nbytes  # each is read; both ways, twice, and a gradient is written
    return {
        what: Kernel(
            call,
            products(rows_left, case.width, case.vocabulary, case.dtype, chunk, many),
            f"{many} mm by {chunk} words",
            (weights + hidden) * (1 if many == 1 else 3),
            many * one,
            "FLOP",
        )
        for what, call, many in parts
    }

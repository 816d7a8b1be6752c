"""``linear_cross_entropy``: bound by matrix products; the limit is those products alone, by chunks of the vocabulary.

Without whole logits, forward and backward take four products: logits, logits again, and a gradient each for the hidden
states and the weight; with logits kept from one to the other, three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_bench import cases, gate, kl, logprob, memory, peers, plots
from m4ov_bench.products import fastest_chunk, products
from m4ov_bench.row import Peer, Row
from m4ov_bench.runtimes import Inference
from m4ov_bench.session import OURS, Kernel, Session, Subject, implementation_name, rows
from m4ov_kernels import linear_cross_entropy
from m4ov_kernels.dispatch import Implementation
from m4ov_kernels.head import LINEAR_LOGPROB
from m4ov_kernels.head import state as states
from m4ov_kernels.head.cross_entropy import FEW_BYTES

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
            implementation=implementation_name(LINEAR_LOGPROB.select(CPU, case.dtype)),
            machine=session.machine,
            green=True,
            errors={},
            memory_mib=used.pop(OURS),
            tokens=case.rows,
            peers={name: Peer(memory_mib=value, absent="memory alone") for name, value in used.items()},
        )


def subject(session: Session, case: cases.HeadCase) -> Subject:
    implementation = LINEAR_LOGPROB.select(CPU, case.dtype)
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
    logits = F.linear(input, weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), target, reduction="none", ignore_index=IGNORE)


def definition(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The mean loss in plain PyTorch, logits whole."""
    return _of_rows(input, weight, target).sum() / (target != IGNORE).sum()


def _kept(case: cases.HeadCase, labelled: int, weight: Tensor) -> int:
    """Bytes of logits that a call keeps."""
    whole = states.count_of_logits(labelled, weight) * weight.element_size()
    return (whole if whole <= FEW_BYTES else 0) if case.kept is None else case.kept


def _forward_options(vocabulary: int, kept: int) -> tuple[Any, ...]:
    """Of the raw forward behind ``linear_cross_entropy``: no bias, no class weights, rounded logits."""
    return None, None, 1.0, 0.0, IGNORE, None, True, False, False, 0, 0, vocabulary, kept, "linear_cross_entropy"


def _backward_options(grad_loss: Tensor, vocabulary: int) -> tuple[Any, ...]:
    return (-grad_loss, None, None, None, 1.0, 0.0, IGNORE, None, True, 0, vocabulary, True, True, False)


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
    tensors, vocabulary = (input, weight, target), case.vocabulary
    kept = _kept(case, labelled, weight)
    options, count = _forward_options(vocabulary, kept), case.rows
    room = states.room_for_logits(input, weight, None, True, 0.0, kept)
    *found, normalizer, room = gate.poisoned(
        *(torch.empty(shape) for shape in ((count,), (count,), (0,), (0,), (count, 0))), torch.empty(2, count), room
    )
    found += [torch.empty(count, 0, dtype=torch.int64), normalizer, room]
    implementation.fwd(*tensors, *options, out=tuple(found))
    out = (*gate.poisoned(input, weight), input.new_empty(0))
    grad_loss = torch.where(target == IGNORE, 0.0, 1.0 / labelled)
    saved = (found[6], found[2], found[7])  # normalizer, entropy, kept logits
    implementation.bwd(*tensors, None, None, *saved, *_backward_options(grad_loss, vocabulary), out=out)
    with torch.no_grad():
        plain[0], exact[0] = _of_rows(input, weight, target), _of_rows(input.double(), weight.double(), target)
    return result + gate.compare_all([f"{name} (out=)" for name in names], [-found[0], *out[:2]], plain, exact)


def kernels(
    session: Session, case: cases.HeadCase, implementation: Implementation, inputs: list[tuple[Tensor, ...]]
) -> dict[str, Kernel]:
    plain = [tuple(tensor.detach() for tensor in tensors) for tensors in inputs]
    count, first = len(plain), plain[0]
    labelled = max(1, int((first[2] != IGNORE).sum()))
    kept = _kept(case, labelled, first[1])
    inference, training = (_forward_options(case.vocabulary, keep) for keep in (0, kept))
    gradients = (torch.zeros_like(first[0]), torch.zeros_like(first[1]), first[0].new_empty(0))
    backward = [
        _backward_options(torch.where(target == IGNORE, 0.0, 1.0 / case.rows), case.vocabulary) for *_, target in plain
    ]

    def forward(index: int) -> None:
        implementation.fwd(*plain[index % count], *inference)

    def both(index: int) -> None:
        tensors = plain[index % count]
        found = implementation.fwd(*tensors, *training)
        assert implementation.bwd is not None
        saved = (found[6], found[2], found[7])
        implementation.bwd(*tensors, None, None, *saved, *backward[index % count], out=gradients)

    chunk = fastest_chunk(labelled, case.width, case.vocabulary, case.dtype, session.quick)
    one = 2.0 * labelled * case.width * case.vocabulary
    whole = kept >= labelled * case.vocabulary * first[0].element_size()
    # Logits once or twice, and a gradient each for the hidden states and the weight.
    parts = (("forward", forward, 1), ("forward + backward", both, 3 if whole else 4))
    weights, hidden = first[1].nbytes, first[0].nbytes  # each is read; both ways, twice, and a gradient is written
    return {
        what: Kernel(
            call,
            products(labelled, case.width, case.vocabulary, case.dtype, chunk, many),
            f"{many} mm by {chunk} words",
            (weights + hidden) * (1 if many == 1 else 3),
            many * one,
            "FLOP",
        )
        for what, call, many in parts
    }

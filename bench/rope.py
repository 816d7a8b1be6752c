"""``qk_norm_mrope`` and ``vision_rope``: bound by memory; the limit is a copy of as many bytes as they must read and
write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from m4ov_bench import cases, gate, peers, rope_positions
from m4ov_bench.row import Row
from m4ov_bench.session import Kernel, Session, Subject, implementation_name, memory_bound, rows
from m4ov_kernels import qk_norm_mrope, vision_rope
from m4ov_kernels.dispatch import Implementation
from m4ov_kernels.rope import QK_NORM_MROPE
from m4ov_kernels.rope import reference as rope_reference
from m4ov_kernels.vision import VISION_ROPE
from m4ov_kernels.vision import reference as vision_reference
from m4ov_kernels.vision.grid import positions_of

EPS, THETA, VISION_THETA, MERGE = 1e-6, 5e6, 1e4, 2


def benchmark(session: Session) -> Iterator[Row]:
    for case in (*cases.ROPE, *cases.VISION_ROPE):
        if session.wants(case):
            made = vision_subject if case.grid else subject
            yield from rows(session, made(case, session.compiled if case.compiled else False))
    yield from rope_positions.benchmark(session)


def _inputs(case: cases.RopeCase) -> tuple[Tensor, ...]:
    """q and k, and the weights of their norms."""
    made = [torch.randn(case.tokens, heads, case.dim).to(case.dtype) for heads in (case.heads, case.kv_heads)]
    if case.norm and not case.grid:
        made += [torch.rand(case.dim).add(0.5).to(case.dtype) for _ in range(2)]
    return tuple(tensor.requires_grad_() for tensor in made)


def _drawn(case: cases.RopeCase) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    """Sets of inputs and of gradients of the results."""
    inputs = [_inputs(case) for _ in range(3)]
    return inputs, [tuple(torch.randn_like(x) for x in tensors[:2]) for tensors in inputs]


def positions(case: cases.RopeCase) -> Tensor:
    """int64 ``[3, T]``: text, with an image in the middle of it."""
    made = torch.arange(case.tokens).expand(3, -1).clone()
    side = int((case.tokens // 2) ** 0.5)
    image = slice(case.tokens // 4, case.tokens // 4 + side * side)
    made[0, image] = case.tokens // 4
    made[1, image] = (case.tokens // 4 + torch.arange(side)).repeat_interleave(side)
    made[2, image] = (case.tokens // 4 + torch.arange(side)).repeat(side)
    return made


def subject(case: cases.RopeCase, compiled: peers.Compiled) -> Subject:
    """One case, on PyTorch's default device."""
    implementation = QK_NORM_MROPE.select(torch.get_default_device(), case.dtype)
    inputs, grads = _drawn(case)
    place = positions(case)
    options = (case.sections, THETA, EPS, True, case.dim, case.numerics)

    def ours(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return qk_norm_mrope(
            q, k, *(weights or (None, None)), place,
            mrope_section=case.sections, theta=THETA, eps=EPS, interleaved=True, numerics=case.numerics,
        )  # fmt: skip

    def definition(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return rope_reference.qk_norm_mrope(q, k, *(weights or (None, None)), place, *options)

    def forward(tensors: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
        assert implementation is not None
        q, k, *weights = tensors
        implementation.fwd(q, k, *(weights or (None, None)), place, *options, out=out)

    def backward(grad: tuple[Tensor, ...], tensors: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
        assert implementation is not None
        given = tensors if case.norm else (None,) * 4
        empty = () if case.norm else (out[0].new_empty(0),) * 2
        implementation.bwd(*grad, *given, place, *options, case.norm, case.norm, out=(*out, *empty))

    return _subject(
        case, "rope", "qk_norm_mrope", implementation, inputs, grads, ours, definition, forward, backward,
        peers.qk_norm_mrope(place, case.sections, THETA, EPS, case.norm, case.dim, compiled),
        # of a pair, six operations; of an element, four of the norm, or ten of its gradient
        (7.0, 13.0) if case.norm else (3.0, 3.0),
    )  # fmt: skip


def vision_subject(case: cases.RopeCase, compiled: peers.Compiled) -> Subject:
    """One case, on PyTorch's default device."""
    implementation = VISION_ROPE.select(torch.get_default_device(), case.dtype)
    inputs, grads = _drawn(case)
    grid = torch.tensor([case.grid])
    options = (grid, None, MERGE, VISION_THETA, case.numerics)

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return vision_rope(q, k, grid, merge_size=MERGE, theta=VISION_THETA, numerics=case.numerics)

    def forward(tensors: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
        assert implementation is not None
        implementation.fwd(*tensors, *options, out=out)

    def backward(grad: tuple[Tensor, ...], tensors: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
        assert implementation is not None
        implementation.bwd(*grad, *options, out=out)

    return _subject(
        case, "vision", "vision_rope", implementation, inputs, grads, ours,
        lambda q, k: vision_reference.vision_rope(q, k, *options), forward, backward,
        peers.vision_rope(positions_of(grid, MERGE, case.tokens), VISION_THETA, case.dim, compiled), (3.0, 3.0),
    )  # fmt: skip


def _subject(
    case: cases.RopeCase,
    family: str,
    operator: str,
    implementation: Implementation | None,
    inputs: list[tuple[Tensor, ...]],
    grads: list[tuple[Tensor, ...]],
    ours: Callable[..., Any],
    definition: Callable[..., Any],
    forward: Callable[..., None],
    backward: Callable[..., None],
    others: dict[str, peers.Peer],
    operations: tuple[float, float],
) -> Subject:
    """``forward(tensors, out)`` and ``backward(grads, tensors, out)``: the raw calls; ``operations``: per element."""
    names = ["q_turned", "k_turned"], ["grad_q", "grad_k", "grad_q_weight", "grad_k_weight"][: len(inputs[0])]
    first = inputs[0], grads[0]
    plain = gate.differentiated(definition, *first)
    exact = gate.differentiated(definition, *([t.double() for t in tensors] for tensors in first))
    result = gate.compare_all([*names[0], *names[1]], gate.differentiated(ours, *first), plain, exact)
    kernels: dict[str, Kernel] = {}
    if implementation is not None:
        raw = [tuple(tensor.detach() for tensor in tensors) for tensors in inputs]
        out, grad_out = gate.poisoned(*raw[0][:2]), gate.poisoned(*raw[0])
        forward(raw[0], out)
        backward(grads[0], raw[0], grad_out)
        titles = [f"{name} (out=)" for name in (*names[0], *names[1])]
        result += gate.compare_all(titles, [*out, *grad_out], plain, exact)
        kernels = _kernels(raw, grads, forward, backward, operations)
    return Subject(
        family=family,
        operator=operator,
        case=str(case),
        implementation=implementation_name(implementation),
        gate=result,
        ours=ours,
        peers=others,
        inputs=inputs,
        grads=grads,
        definition=definition,
        kernels=kernels,
    )


def _kernels(
    raw: list[tuple[Tensor, ...]],
    grads: list[tuple[Tensor, ...]],
    forward: Callable[..., None],
    backward: Callable[..., None],
    operations: tuple[float, float],
) -> dict[str, Kernel]:
    count = len(raw)
    out = [tuple(torch.zeros_like(tensor) for tensor in tensors) for tensors in raw]
    elements = sum(tensor.numel() for tensor in raw[0][:2])
    block = elements * raw[0][0].element_size()
    # forward: q and k, in and out; backward: gradients, in and out, and with a norm q and k
    moved = (2 * block, (3 if len(raw[0]) > 2 else 2) * block)
    calls = (
        lambda index: forward(raw[index % count], out[index % count][:2]),
        lambda index: backward(grads[index % count], raw[index % count], out[index % count]),
    )
    copies = [
        [list(zip(tensors[:2], sinks[:2], strict=True)) for tensors, sinks in zip(source, out, strict=True)]
        for source in (raw, grads)
    ]
    return {
        what: memory_bound(calls[i], moved[i], operations[i] * elements, copies[i])
        for i, what in enumerate(("forward", "backward"))
    }

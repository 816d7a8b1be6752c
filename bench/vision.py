"""``scatter_vision``, ``deepstack_add`` and ``interpolate_position_embeddings``: bound by memory; the limit is a copy
of as many bytes as they must read and write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from m4ov_bench import cases, gate, peers, vision_pixels
from m4ov_bench.row import Row
from m4ov_bench.session import Kernel, Session, Subject, implementation_name, memory_bound, rows
from m4ov_kernels import deepstack_add, interpolate_position_embeddings, scatter_vision
from m4ov_kernels.dispatch import Implementation
from m4ov_kernels.vision import reference
from m4ov_kernels.vision.interpolate import INTERPOLATE
from m4ov_kernels.vision.scatter import DEEPSTACK_ADD, SCATTER_VISION

_SETS = 3


def benchmark(session: Session) -> Iterator[Row]:
    for case in cases.FEATURE_ROWS:
        if case.quick or not session.quick:
            for add in (False, True):
                yield from rows(session, feature_rows(case, add, session.compiled if case.compiled else False))
    for grids in cases.POSITION_EMBEDDINGS:
        if grids.quick or not session.quick:
            yield from rows(session, interpolation(grids, session.compiled if grids.compiled else False))
    yield from vision_pixels.benchmark(session)


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


def feature_rows(case: cases.FeatureRowsCase, add: bool, compiled: peers.Compiled) -> Subject:
    """``deepstack_add``, or ``scatter_vision``, on PyTorch's default device."""
    operator, ours, define, peer = (
        (DEEPSTACK_ADD, deepstack_add, reference.deepstack_add, peers.deepstack_add)
        if add
        else (SCATTER_VISION, scatter_vision, reference.scatter_vision, peers.scatter_vision)
    )
    mask = _mask(case)
    positions, tokens, width = mask.nonzero()[:, 0], case.tokens, case.width
    implementation = operator.select(torch.get_default_device(), case.dtype)
    sizes = (tokens, len(positions))
    inputs = [tuple(_random(n, width, dtype=case.dtype).requires_grad_() for n in sizes) for _ in range(_SETS)]
    grads = [(_random(tokens, width, dtype=case.dtype),) for _ in range(_SETS)]

    def call(base: Tensor, features: Tensor) -> Tensor:
        return ours(base, features, positions)

    def definition(base: Tensor, features: Tensor) -> Tensor:
        return define(base, features, positions)

    def raw(base: Tensor, features: Tensor, grad: Tensor) -> list[Tensor]:
        assert implementation is not None
        (output, grad_base, grad_features) = gate.poisoned(base, base, features)
        implementation.fwd(base, features, positions, out=output)
        if add:
            implementation.bwd(grad, positions, out=grad_features)
            return [output, grad, grad_features]
        implementation.bwd(grad, positions, True, True, out=(grad_base, grad_features))
        return [output, grad_base, grad_features]

    return Subject(
        family="vision",
        operator=operator.name,
        case=str(case),
        implementation=implementation_name(implementation),
        gate=_check(("output", "grad_base", "grad_features"), call, definition, implementation, raw, inputs, grads),
        ours=call,
        peers=peer(mask, compiled),
        inputs=inputs,
        grads=grads,
        definition=definition,
        kernels={} if implementation is None else _row_kernels(implementation, positions, inputs, grads, add),
    )


def _mask(case: cases.FeatureRowsCase) -> Tensor:
    """An image in the middle of every 1,024 tokens, or fewer."""
    sample = min(case.tokens, 1024)
    place = torch.arange(case.tokens) % sample
    begin = round(sample * (1 - case.share) / 2)
    return (place >= begin) & (place < begin + round(sample * case.share))


def _row_kernels(
    implementation: Implementation,
    positions: Tensor,
    inputs: Sequence[tuple[Tensor, ...]],
    grads: Sequence[tuple[Tensor, ...]],
    add: bool,
) -> dict[str, Kernel]:
    plain = [tuple(tensor.detach() for tensor in tensors) for tensors in inputs]
    sinks = [(torch.zeros_like(base), torch.zeros_like(features)) for base, features in plain]
    count = len(plain)

    def forward(index: int) -> None:
        implementation.fwd(*plain[index % count], positions, out=sinks[index % count][0])

    def backward(index: int) -> None:
        grad, out = grads[index % count][0], sinks[index % count]
        if add:
            implementation.bwd(grad, positions, out=out[1])
        else:
            implementation.bwd(grad, positions, True, True, out=out)

    base, features = plain[0][0].nbytes, plain[0][1].nbytes
    # Forward: a row from either, or both, to the output. Backward: the gradient; one of the base, zeros among it, and
    # one of the features; or the features' alone.
    moved = {"forward": 2 * base + add * features, "backward": 2 * features if add else 2 * base + features}
    into_base = [[(tensors[0], sink[0])] for tensors, sink in zip(plain, sinks, strict=True)]
    into_features = [[(tensors[1], sink[1])] for tensors, sink in zip(plain, sinks, strict=True)]
    copies = {"forward": into_base, "backward": into_features if add else into_base}
    flops = {"forward": float(add * plain[0][1].numel()), "backward": 0.0}
    calls = {"forward": forward, "backward": backward}
    return {what: memory_bound(call, moved[what], flops[what], copies[what]) for what, call in calls.items()}


def interpolation(case: cases.PositionEmbeddingsCase, compiled: peers.Compiled) -> Subject:
    """``interpolate_position_embeddings`` with the addition, on PyTorch's default device."""
    grid_thw, table_rows, width = torch.tensor(case.grids), case.side**2, case.width
    implementation = INTERPOLATE.select(torch.get_default_device(), case.dtype)
    sizes = (table_rows, case.patches)
    inputs = [tuple(_random(n, width, dtype=case.dtype).requires_grad_() for n in sizes) for _ in range(_SETS)]
    grads = [(_random(case.patches, width, dtype=case.dtype),) for _ in range(_SETS)]

    def call(table: Tensor, hidden_states: Tensor) -> Tensor:
        return interpolate_position_embeddings(table, grid_thw, merge_size=case.merge_size, hidden_states=hidden_states)

    def definition(table: Tensor, hidden_states: Tensor) -> Tensor:
        return reference.interpolate_position_embeddings(
            table, grid_thw, hidden_states, case.patches, case.merge_size, "hf"
        )

    def forward(table: Tensor, hidden_states: Tensor, out: Tensor) -> None:
        assert implementation is not None
        implementation.fwd(table, grid_thw, hidden_states, case.patches, case.merge_size, "hf", out=out)

    def backward(grad: Tensor, out: Tensor) -> None:
        assert implementation is not None
        implementation.bwd(grad, grid_thw, table_rows, case.merge_size, out=out)

    def raw(table: Tensor, hidden_states: Tensor, grad: Tensor) -> list[Tensor]:
        grad_table, output = gate.poisoned(table, hidden_states)
        forward(table, hidden_states, output)
        backward(grad, grad_table)
        return [output, grad_table, grad]

    kernels = {}
    if implementation is not None:
        plain = [tuple(tensor.detach() for tensor in tensors) for tensors in inputs]
        sinks = [(torch.zeros_like(table), torch.zeros_like(hidden)) for table, hidden in plain]
        copies = [[(tensors[1], sink[1])] for tensors, sink in zip(plain, sinks, strict=True)]
        table, hidden = plain[0][0].nbytes, plain[0][1].nbytes
        kernels = {  # four products and three sums, and one more; the backward four of each
            "forward": memory_bound(
                lambda index: forward(*plain[index % _SETS], sinks[index % _SETS][1]),
                2 * hidden + table,
                8.0 * plain[0][1].numel(),
                copies,
            ),
            "backward": memory_bound(
                lambda index: backward(grads[index % _SETS][0], sinks[index % _SETS][0]),
                hidden + table,
                8.0 * plain[0][1].numel(),
                copies,
            ),
        }
    return Subject(
        family="vision",
        operator=INTERPOLATE.name,
        case=str(case),
        implementation=implementation_name(implementation),
        gate=_check(("output", "grad_table", "grad_hidden"), call, definition, implementation, raw, inputs, grads),
        ours=call,
        peers=peers.interpolate_position_embeddings(grid_thw, case.side, case.merge_size, compiled),
        inputs=inputs,
        grads=grads,
        definition=definition,
        kernels=kernels,
    )


def _check(
    names: Sequence[str],
    call: Callable[..., Any],
    definition: Callable[..., Any],
    implementation: Implementation | None,
    raw: Callable[..., list[Tensor]],
    inputs: Sequence[tuple[Tensor, ...]],
    grads: Sequence[tuple[Tensor, ...]],
) -> gate.Gate:
    """The call with autograd, and the raw kernels into poisoned outputs, against plain PyTorch and float64."""
    given, grad = inputs[0], grads[0]
    doubled = [tensor.detach().double().requires_grad_() for tensor in given]
    plain = gate.differentiated(definition, given, grad)
    exact = gate.differentiated(definition, doubled, [grad[0].double()])
    result = gate.compare_all(names, gate.differentiated(call, given, grad), plain, exact)
    if implementation is None:
        return result
    outputs = raw(*(tensor.detach() for tensor in given), *grad)
    return result + gate.compare_all([f"{name} (out=)" for name in names], outputs, plain, exact)

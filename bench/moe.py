"""Mixture of experts. ``grouped_linear``: the limit is, over experts, the longer of its products at the rate of
``torch.mm`` and its bytes at that of a copy, both as measured in the run. The others are bound by memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from m4ov_bench import cases, gate, measure, peers
from m4ov_bench.row import Row
from m4ov_bench.session import Kernel, Session, Subject, implementation_name, memory_bound, rows
from m4ov_kernels import grouped_linear, permute, route_topk, swiglu, unpermute
from m4ov_kernels.dispatch import OPERATORS, Implementation
from m4ov_kernels.moe import reference

_ALL = 1 << 26  # elements of a weight up to which everything is judged; of a larger one, three experts


def benchmark(session: Session) -> Iterator[Row]:
    for case in cases.MOE:
        if session.wants(case):
            yield from rows(session, subject(session, case))
            measure.release()


def subject(session: Session, case: cases.MoECase) -> Subject:
    """One case, on PyTorch's default device."""
    if case.operator == "experts":
        return _block(case)
    implementation = OPERATORS[case.operator].select(torch.get_default_device(), case.dtype)
    made = {"grouped_linear": _grouped, "permute": _permute, "unpermute": _unpermute, "route_topk": _route}
    return made[case.operator](session, case, implementation)


def chosen(case: cases.MoECase) -> tuple[Tensor, Tensor]:
    """``[T, K]`` experts by Zipf's law, in a random order of popularity, and weights."""
    popularity = 1 / (1 + torch.randperm(case.experts).float())
    experts = torch.multinomial(popularity.expand(case.tokens, -1), case.top_k)
    weights = torch.rand(case.tokens, case.top_k) + 0.1
    return experts.to(torch.int32), weights / weights.sum(-1, keepdim=True)


def matrices(case: cases.MoECase, *shape: int) -> Tensor:
    """Of a large weight every expert's are the same numbers: to draw them takes longer than the measurement."""
    one = (torch.randn(shape[1:]) * shape[-1] ** -0.5).to(case.dtype)
    weight = one.repeat(shape[0], 1, 1)
    if weight.numel() <= _ALL:
        weight = (torch.randn(shape) * shape[-1] ** -0.5).to(case.dtype)
    return weight.requires_grad_(case.backward)


def limit_seconds(session: Session, case: cases.MoECase, sizes: list[int], extra_bytes: int = 0) -> float:
    """Σ over experts of max(products / rate, bytes / bandwidth); ``extra_bytes``: what else is read or written for each
    expert, whether it has rows or not."""
    rate = session.machine.limits[f"{'fp32' if case.dtype is torch.float32 else 'bf16'} mm FLOP/s"]
    bandwidth, size = session.machine.limits["copy B/s"], case.dtype.itemsize
    weight = case.width * case.columns
    total = 0.0
    for rows_of in sizes:
        moved = (rows_of * (case.width + case.columns) + weight * (rows_of > 0)) * size + extra_bytes
        total += max(2 * rows_of * weight / rate, moved / bandwidth)
    return total


def _grouped(session: Session, case: cases.MoECase, implementation: Implementation | None) -> Subject:
    _, _, offsets = permute(torch.zeros(case.tokens, 1), chosen(case)[0], case.experts)
    sets = 1 if case.experts * case.width * case.columns > _ALL else 3
    weight = [matrices(case, case.experts, case.columns, case.width) for _ in range(sets)]
    inputs = [
        (torch.randn(case.rows, case.width).to(case.dtype).requires_grad_(case.backward), matrix) for matrix in weight
    ]
    grads = [(torch.randn(case.rows, case.columns).to(case.dtype),) for _ in range(sets)]

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return grouped_linear(x, w, offsets)

    whole = weight[0].numel() <= _ALL
    return Subject(
        family="moe",
        operator="grouped_linear",
        case=str(case),
        implementation=implementation_name(implementation),
        gate=_grouped_gate(case, ours, inputs[0], grads[0], offsets),
        ours=ours,
        peers=peers.grouped_linear(offsets),
        inputs=inputs,
        grads=grads if case.backward else None,
        definition=(lambda x, w: reference.grouped_linear(x, w, offsets)) if whole else None,
        kernels={}
        if implementation is None
        else _grouped_kernels(session, case, implementation, inputs, grads, offsets),
    )


def _grouped_gate(
    case: cases.MoECase, call: Callable[..., Tensor], inputs: tuple[Tensor, ...], grads: tuple[Tensor], offsets: Tensor
) -> gate.Gate:
    """Of a large weight: of the largest, a middle and the smallest expert."""
    picked = list(range(case.experts))
    if inputs[1].numel() > _ALL:
        by_size = offsets.diff().argsort().tolist()
        picked = sorted({by_size[0], by_size[len(by_size) // 2], by_size[-1]})
    bounds = list(pairwise(offsets.tolist()))
    take = torch.cat([torch.arange(*bounds[expert]) for expert in picked]).to(offsets.device)
    some = torch.tensor([0, *(bounds[expert][1] - bounds[expert][0] for expert in picked)]).cumsum(0)
    some = some.to(offsets.device)

    def definition(x: Tensor, w: Tensor) -> Tensor:
        return reference.grouped_linear(x, w, some)

    def judged(dtype: torch.dtype) -> list[Tensor]:
        parts = [inputs[0].detach()[take].to(dtype), inputs[1].detach()[picked].to(dtype)]
        leaves = [part.requires_grad_(case.backward) for part in parts]
        return gate.differentiated(definition, leaves, [grads[0][take].to(dtype)] if case.backward else None)

    found = gate.differentiated(call, inputs, grads if case.backward else None)
    ours = [found[0][take], *([found[1][take], found[2][picked]] if case.backward else [])]
    del found  # as large as the inputs
    names = ["output", "grad_rows", "grad_weight"][: len(ours)]
    return gate.compare_all(names, ours, judged(case.dtype), judged(torch.float64))


def _grouped_kernels(
    session: Session,
    case: cases.MoECase,
    implementation: Implementation,
    inputs: list[tuple[Tensor, ...]],
    grads: list[tuple[Tensor]],
    offsets: Tensor,
) -> dict[str, Kernel]:
    plain = [tuple(tensor.detach() for tensor in tensors) for tensors in inputs]
    count, sizes = len(plain), offsets.diff().tolist()
    out = [torch.zeros(case.rows, case.columns, dtype=case.dtype) for _ in plain]
    size, weight = case.dtype.itemsize, case.width * case.columns
    moved = sum(x.nbytes for x in (plain[0][0], out[0])) + sum(n > 0 for n in sizes) * weight * size
    flops = 2.0 * case.rows * weight
    # What is interleaved: a product of torch.mm, a part of the limit; how much more there is to do is `scale`.
    left, right = (torch.randn(2048, 2048).to(case.dtype) for _ in range(2))
    sink = torch.empty_like(left)
    rate = session.machine.limits[f"{'fp32' if case.dtype is torch.float32 else 'bf16'} mm FLOP/s"]
    alone = 2 * 2048**3 / rate
    name = "Σ over experts of max(products at torch.mm's rate, bytes at a copy's)"

    def kernel(call: Callable[[int], object], seconds: float, bytes_moved: float, products: float) -> Kernel:
        limit = lambda index: torch.mm(left, right.t(), out=sink)  # noqa: E731
        return Kernel(call, limit, name, bytes_moved, products, "FLOP", seconds / alone)

    def forward(index: int) -> None:
        implementation.fwd(*plain[index % count], offsets, out=out[index % count])

    found = {"forward": kernel(forward, limit_seconds(session, case, sizes), moved, flops)}
    if case.backward:
        back = [tuple(torch.zeros_like(x) for x in tensors) for tensors in plain]

        def backward(index: int) -> None:
            place = index % count
            implementation.bwd(grads[place][0], *plain[place], offsets, True, True, out=back[place])  # type: ignore[misc]

        seconds = limit_seconds(session, case, sizes) + limit_seconds(session, case, sizes, weight * size)
        found["backward"] = kernel(backward, seconds, 2 * moved + case.experts * weight * size, 2 * flops)
    return found


def _block(case: cases.MoECase) -> Subject:
    """The experts as a model calls them, against Hugging Face's."""
    experts, weights = chosen(case)
    sets = 1 if case.experts * case.width * case.columns > _ALL else 2
    inputs = [
        (
            torch.randn(case.tokens, case.width).to(case.dtype).requires_grad_(case.backward),
            matrices(case, case.experts, 2 * case.columns, case.width),
            matrices(case, case.experts, case.width, case.columns),
        )
        for _ in range(sets)
    ]
    grads = [(torch.randn(case.tokens, case.width).to(case.dtype),) for _ in range(sets)] if case.backward else None

    def ours(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        taken, order, offsets = permute(x, experts, case.experts)
        gates, ups = grouped_linear(taken, gate_up, offsets).chunk(2, -1)
        return unpermute(grouped_linear(swiglu(gates, ups), down, offsets), order, weights)

    def definition(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        wide = weights.to(torch.promote_types(x.dtype, torch.float32))
        taken, order, offsets = reference.permute(x, experts, case.experts)
        gates, ups = _product(taken, gate_up, offsets).chunk(2, -1)
        activated = torch.nn.functional.silu(gates) * ups
        return reference.unpermute(_product(activated, down, offsets), order, wide)

    def judged(dtype: torch.dtype) -> list[Tensor]:
        widened = inputs[0] if whole else inputs[0][:1]  # large weights are, expert by expert
        leaves = [x.detach().to(dtype).requires_grad_(case.backward) for x in widened]
        leaves += [x.detach() for x in inputs[0][len(widened) :]]
        return gate.differentiated(definition, leaves, grads and [g.to(dtype) for g in grads[0]])

    whole = inputs[0][1].numel() <= _ALL
    names = ("output", "grad_hidden_states", "grad_gate_up", "grad_down")
    ours_now = gate.differentiated(ours, inputs[0], grads and grads[0])
    exact = judged(torch.float64) if whole else judged(torch.float32)
    return Subject(
        family="moe",
        operator="grouped_linear",
        case=str(case),
        implementation=implementation_name(OPERATORS["grouped_linear"].select(torch.device("cpu"), case.dtype)),
        gate=gate.compare_all(names[: len(ours_now)], ours_now, judged(case.dtype), exact),
        ours=ours,
        peers=peers.experts_block(experts, weights, case.experts),
        inputs=inputs,
        grads=grads,
        definition=definition if whole else None,
    )


def _product(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The reference's, of a weight that may be in another dtype."""
    if rows.dtype is weight.dtype:
        return reference.grouped_linear(rows, weight, offsets)
    spans = zip(pairwise(offsets.tolist()), weight.unbind(), strict=True)
    return torch.cat([rows[first:end] @ matrix.to(rows.dtype).mT for (first, end), matrix in spans])


def _simple(
    case: cases.MoECase,
    implementation: Implementation | None,
    ours: Callable[..., Any],
    definition: Callable[..., Any],
    theirs: Any,
    inputs: list[tuple[Tensor, ...]],
    grads: list[tuple[Tensor, ...]],
    names: list[str],
    kernels: dict[str, Kernel],
    terms: dict[str, Tensor] | None = None,
) -> Subject:
    plain = gate.differentiated(definition, inputs[0], grads[0])
    exact = gate.differentiated(definition, [x.double() for x in inputs[0]], [x.double() for x in grads[0]])
    return Subject(
        family="moe",
        operator=case.operator,
        case=str(case),
        implementation=implementation_name(implementation),
        gate=gate.compare_all(names, gate.differentiated(ours, inputs[0], grads[0]), plain, exact, terms),
        ours=ours,
        peers=theirs,
        inputs=inputs,
        grads=grads,
        definition=definition,
        kernels=kernels,
    )


def _permute(session: Session, case: cases.MoECase, implementation: Implementation | None) -> Subject:
    experts, _ = chosen(case)
    inputs = [(torch.randn(case.tokens, case.width).to(case.dtype).requires_grad_(),) for _ in range(3)]
    grads: list[tuple[Tensor, ...]] = [(torch.randn(case.rows, case.width).to(case.dtype),) for _ in range(3)]
    order = reference.permute(inputs[0][0].detach(), experts, case.experts)[1]
    kernels = {}
    if implementation is not None:
        outs = [implementation.fwd(x.detach(), experts, case.experts) for (x,) in inputs]
        back = [torch.zeros_like(x) for (x,) in inputs]

        def forward(index: int) -> None:
            implementation.fwd(inputs[index % 3][0].detach(), experts, case.experts, out=outs[index % 3])

        def backward(index: int) -> None:
            implementation.bwd(grads[index % 3][0], order, out=back[index % 3])  # type: ignore[misc]

        moved = inputs[0][0].nbytes + grads[0][0].nbytes
        copies = [[(g[0], out[0])] for g, out in zip(grads, outs, strict=True)]
        kernels = {
            "forward": memory_bound(forward, moved, 0.0, copies),
            "backward": memory_bound(backward, moved, float(case.rows * case.width), copies),
        }

    def ours(x: Tensor) -> Tensor:
        return permute(x, experts, case.experts)[0]

    def definition(x: Tensor) -> Tensor:
        return reference.permute(x, experts, case.experts)[0]

    names = ["rows", "grad_hidden_states"]
    return _simple(case, implementation, ours, definition, peers.permute(experts), inputs, grads, names, kernels)


def _unpermute(session: Session, case: cases.MoECase, implementation: Implementation | None) -> Subject:
    experts, weights = chosen(case)
    order = reference.permute(torch.zeros(case.tokens, 1), experts, case.experts)[1]
    inputs = [
        (torch.randn(case.rows, case.width).to(case.dtype).requires_grad_(), weights.clone().requires_grad_())
        for _ in range(3)
    ]
    grads: list[tuple[Tensor, ...]] = [(torch.randn(case.tokens, case.width).to(case.dtype),) for _ in range(3)]
    kernels = {}
    if implementation is not None:
        plain = [tuple(x.detach() for x in tensors) for tensors in inputs]
        outs = [torch.zeros_like(g[0]) for g in grads]
        back = [(torch.zeros_like(x), torch.zeros_like(w)) for x, w in plain]

        def forward(index: int) -> None:
            x, w = plain[index % 3]
            implementation.fwd(x, order, w, out=outs[index % 3])

        def backward(index: int) -> None:
            x, w = plain[index % 3]
            implementation.bwd(grads[index % 3][0], x, order, w, True, True, out=back[index % 3])  # type: ignore[misc]

        one = inputs[0][0].nbytes
        copies = [[(x, sink)] for (x, _), (sink, _) in zip(plain, back, strict=True)]
        kernels = {
            "forward": memory_bound(forward, one + outs[0].nbytes, 2.0 * case.rows * case.width, copies),
            "backward": memory_bound(backward, 2 * one + outs[0].nbytes, 3.0 * case.rows * case.width, copies),
        }

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return unpermute(x, order, w)

    def definition(x: Tensor, w: Tensor) -> Tensor:
        return reference.unpermute(x, order, w)

    names = ["output", "grad_rows", "grad_weights"]
    return _simple(case, implementation, ours, definition, peers.unpermute(order), inputs, grads, names, kernels)


def _route(session: Session, case: cases.MoECase, implementation: Implementation | None) -> Subject:
    inputs = [(torch.randn(case.tokens, case.experts).to(case.dtype).requires_grad_(),) for _ in range(3)]
    grads: list[tuple[Tensor, ...]] = [
        (torch.randn(case.tokens, case.top_k), torch.randn(case.experts)) for _ in range(3)
    ]

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        weights, _, load = route_topk(x, top_k=case.top_k)
        return weights, load.probability

    def definition(x: Tensor) -> tuple[Tensor, Tensor]:
        weights, _, _, probability = reference.route_topk(x, case.top_k, True)
        return weights, probability

    kernels = {}
    if implementation is not None:
        outs = [implementation.fwd(x.detach(), case.top_k, True) for (x,) in inputs]
        back = [torch.zeros_like(x) for (x,) in inputs]

        def forward(index: int) -> None:
            implementation.fwd(inputs[index % 3][0].detach(), case.top_k, True, out=outs[index % 3])

        def backward(index: int) -> None:
            (x,), (weights, experts, *_), towards = inputs[index % 3], outs[index % 3], grads[index % 3]
            implementation.bwd(x.detach(), *towards, weights, experts, True, out=back[index % 3])  # type: ignore[misc]

        moved = inputs[0][0].nbytes + 8 * case.rows
        copies = [[(x.detach(), sink)] for (x,), sink in zip(inputs, back, strict=True)]
        exponentials = 4.0 * case.tokens * case.experts
        kernels = {
            "forward": memory_bound(forward, moved, exponentials, copies),
            "backward": memory_bound(backward, moved + inputs[0][0].nbytes, 2 * exponentials, copies),
        }
    names = ["weights", "probability", "grad_logits"]
    terms = {"grad_logits": route_terms(inputs[0][0].detach(), grads[0], case.top_k)}
    theirs = peers.route_topk(case.top_k)
    return _simple(case, implementation, ours, definition, theirs, inputs, grads, names, kernels, terms)


def route_terms(logits: Tensor, grads: tuple[Tensor, ...], top_k: int, normalize: bool = True) -> Tensor:
    """What the gradient is a difference of: p · (|g| + Σ p |g|), and the same of the chosen among themselves."""
    p = logits.double().softmax(-1)
    chosen = logits.sort(descending=True, stable=True).indices[:, :top_k]
    slopes = (grads[1].double().abs() / max(len(p), 1)).expand_as(p).clone()
    among, towards, weights = torch.zeros_like(p), grads[0].double().abs(), p.gather(1, chosen)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
        among.scatter_(1, chosen, weights * (towards + (weights * towards).sum(-1, keepdim=True)))
    else:
        slopes.scatter_add_(1, chosen, towards)
    return p * (slopes + (p * slopes).sum(-1, keepdim=True)) + among

"""``varlen_attention`` for the GPU suite. The limit is one large matrix product, scaled to as many operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from m4ov_bench import cases
from m4ov_bench import peers as cpu_peers
from m4ov_bench.gpu.example import Example, Maker
from m4ov_bench.session import Kernel, Session, Subject, as_called, implementation_name
from m4ov_kernels import varlen_attention
from m4ov_kernels.attention import VARLEN_ATTENTION, reference

# lengths, heads, key heads, width of a head, causal
_EXAMPLES = (
    ((37, 128, 1), 4, 2, 64, True),
    ((37, 128, 1), 4, 4, 64, False),
    ((300, 17, 511), 16, 8, 128, True),
    ((64, 0, 65), 4, 2, 72, False),
    ((1000,), 2, 1, 128, True),
)
_TINY_EXAMPLES = (((5, 1, 9), 2, 1, 16, True), ((4, 0, 3), 2, 2, 8, False))
_SIDE = 8192  # of the square matrices whose product is the limit


def examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    for case in _TINY_EXAMPLES if tiny else _EXAMPLES:
        yield _example(maker, *case)


def _example(maker: Maker, sizes: tuple[int, ...], heads: int, kv_heads: int, dim: int, causal: bool) -> Example:
    tokens, scale = sum(sizes), dim**-0.5
    bounds = _bounds(sizes, maker.device)
    inputs = tuple(maker.normal((tokens, count, dim)) for count in (heads, kv_heads, kv_heads))
    grad = maker.normal((tokens, heads, dim), grad=False)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, bounds, causal=causal, max_seqlen=max(sizes))

    def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.varlen_attention(q, k, v, bounds, None, causal, scale)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As Hugging Face's eager attention: scores and probabilities rounded to the dtype."""
        outputs = [q[:0]]
        for rows, keys, values in _sequences(q, k, v, sizes):
            scores = (rows @ keys.mT * scale).masked_fill(_hidden(rows, causal), -torch.inf)
            probabilities = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
            outputs.append((probabilities @ values).transpose(0, 1))
        return torch.cat(outputs)

    names = ("output", "grad_q", "grad_k", "grad_v")
    terms = dict(zip(names, _terms(*inputs, grad, sizes, causal), strict=True))
    title = f"{list(sizes)}, {heads} heads of {dim}, {kv_heads} for keys" + ", causal" * causal
    return Example(title, function, definition, inputs, (grad,), names, terms, plain)


def _bounds(sizes: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32).to(device)


def _sequences(q: Tensor, k: Tensor, v: Tensor, sizes: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
    """``[H, T, D]`` of each sequence, the key heads repeated."""
    group = q.shape[1] // k.shape[1]
    for rows, keys, values in zip(*(x.split(list(sizes)) for x in (q, k, v)), strict=True):
        repeated = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (keys, values))
        yield rows.transpose(0, 1), *repeated


def _hidden(rows: Tensor, causal: bool) -> Tensor:
    hidden = torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool, device=rows.device)
    return hidden.triu(1) if causal else torch.zeros_like(hidden)


@torch.no_grad()
def _terms(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, sizes: Sequence[int], causal: bool) -> list[Tensor]:
    """What output and gradients are sums and differences of: the same sums over absolute values, in float64."""
    group, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    results: list[list[Tensor]] = [[x.double()[:0]] for x in (q, q, k, v)]
    grads = grad.double().split(list(sizes))
    for g, (rows, keys, values) in zip(grads, _sequences(q.double(), k.double(), v.double(), sizes), strict=True):
        g = g.transpose(0, 1).abs()
        p = (rows @ keys.mT * scale).masked_fill(_hidden(rows, causal), -torch.inf).softmax(-1)
        a = g @ values.abs().mT
        a = p * (a + (p * a).sum(-1, keepdim=True)) * scale
        shared = [x.unflatten(0, (-1, group)).sum(1) for x in (a.mT @ rows.abs(), p.mT @ g)]
        for result, term in zip(results, [p @ values.abs(), a @ keys.abs(), *shared], strict=True):
            result.append(term.transpose(0, 1))
    return [torch.cat(result) for result in results]


def subjects(session: Session, device: torch.device, tiny: bool) -> Iterator[Subject]:
    for case in cases.TINY_ATTENTION if tiny else cases.GPU_ATTENTION:
        maker, bounds = Maker(device, case.dtype), _bounds(case.sizes, device)
        longest, side = max(case.sizes), 64 if tiny else _SIDE
        heads = (case.heads, case.kv_heads, case.kv_heads)
        gated = _example(maker, case.sizes, *heads[:2], case.dim, case.causal)
        with torch.device(device):
            others = cpu_peers.varlen_attention(case.sizes, case.causal, case.compiled)

        def ours(
            q: Tensor, k: Tensor, v: Tensor, b: Tensor = bounds, c: bool = case.causal, m: int = longest
        ) -> Tensor:
            return varlen_attention(q, k, v, b, causal=c, max_seqlen=m)

        subject = Subject(
            family="attention",
            operator="varlen_attention",
            case=str(case),
            implementation=implementation_name(VARLEN_ATTENTION.select(device, case.dtype)),
            gate=gated.judge(gated.run()),
            ours=ours,
            peers=others,
            inputs=[tuple(maker.normal((case.tokens, n, case.dim)) for n in heads) for _ in range(3)],
            grads=[(maker.normal((case.tokens, case.heads, case.dim), grad=False),) for _ in range(3)],
        )
        operands = [torch.randn(side, side, device=device).to(case.dtype) for _ in range(3)]

        def limit(_: int, o: list[Tensor] = operands) -> None:
            torch.mm(o[0], o[1], out=o[2])

        kernels = {}
        for what, products in (("forward", 2), ("forward + backward", 7)):
            work = 2.0 * products * case.pairs * case.dim
            call = as_called(subject, ours, "backward" in what)
            # Forward: q, k, v in, output out; backward: those and the gradient in, three gradients out.
            block = case.tokens * case.dim * case.dtype.itemsize
            own, shared = case.heads * block, case.kv_heads * block
            moved = 2.0 * own + 2.0 * shared + (4.0 * own + 4.0 * shared) * ("backward" in what)
            scale = work / (2.0 * side**3)
            kernels[what] = Kernel(call, limit, "mm of as many operations", moved, work, "FLOP", scale)
        yield replace(subject, kernels=kernels)

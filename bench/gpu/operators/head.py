"""``linear_cross_entropy`` for the GPU suite. The limit is the same matrix products by the vendor's library, with whole
logits: one product forward; four both ways, for the logits are computed twice where they are not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_bench import cases
from m4ov_bench import peers as cpu_peers
from m4ov_bench.gpu import device as chip
from m4ov_bench.gpu import peers
from m4ov_bench.gpu.example import Example, Maker
from m4ov_bench.measure import Call
from m4ov_bench.session import OURS, Kernel, Session, Subject, as_called, implementation_name
from m4ov_kernels import linear_cross_entropy
from m4ov_kernels.head import LINEAR_LOGPROB

IGNORE = -100
# rows, width, vocabulary, share of labelled rows, label smoothing, bias, whether num_valid is given, layout
_EXAMPLES = (
    (33, 128, 1000, 0.5, 0.0, False, True, "contiguous"),
    (33, 128, 1000, 0.5, 0.0, False, False, "contiguous"),
    (257, 512, 4097, 0.7, 0.1, True, True, "contiguous"),
    (5, 65, 17, 1.0, 0.0, True, False, "offset"),
    (64, 96, 2050, 0.5, 0.0, False, True, "wide rows"),
    (6, 64, 150, 0.0, 0.0, False, True, "contiguous"),
    (0, 64, 150, 1.0, 0.0, False, False, "contiguous"),
    (1024, 2048, 151936, 0.25, 0.0, False, True, "contiguous"),
    (512, 2048, 151936, 1.0, 0.0, False, False, "contiguous"),
)
_TINY_EXAMPLES = (
    (7, 16, 40, 0.5, 0.0, False, True, "contiguous"),
    (5, 17, 33, 0.5, 0.1, True, False, "wide rows"),
    (0, 16, 33, 1.0, 0.0, False, False, "contiguous"),
)


def examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    for case in _TINY_EXAMPLES if tiny else _EXAMPLES:
        yield _example(maker, *case)


def _example(
    maker: Maker,
    rows: int,
    width: int,
    vocabulary: int,
    labelled: float,
    smoothing: float,
    bias: bool,
    known: bool,
    layout: str,
) -> Example:
    input = maker.normal((rows, width), layout)
    weight = maker.normal((vocabulary, width), layout, width**-0.5)
    with torch.device(maker.device):
        target = cases.targets(cases.HeadCase(rows, width, vocabulary, maker.dtype, labelled))
    num_valid = round(rows * labelled) if known else None
    biases = (maker.normal((vocabulary,)),) if bias else ()
    grads = (torch.rand(rows, device=maker.device) + 0.5,)

    def function(input: Tensor, weight: Tensor, target: Tensor, *bias: Tensor) -> Tensor:
        return linear_cross_entropy(
            input,
            weight,
            target,
            linear_bias=bias[0] if bias else None,
            ignore_index=IGNORE,
            reduction="none",
            label_smoothing=smoothing,
            num_valid=num_valid,
        )

    def definition(input: Tensor, weight: Tensor, target: Tensor, *bias: Tensor) -> Tensor:
        logits = F.linear(input, weight, *bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        options = {"ignore_index": IGNORE, "label_smoothing": smoothing}
        return F.cross_entropy(logits, target, reduction="none", **options)

    title = f"M {rows}, D {width}, V {vocabulary}, {labelled:.0%} labelled, {layout}"
    title += f", smoothing {smoothing}" * (smoothing > 0) + ", bias" * bias + ", num_valid" * known
    names = ("loss", "grad_input", "grad_weight", *(["grad_bias"] if bias else []))
    terms = _terms(input, weight, target, biases[0] if bias else None, grads[0])
    return Example(title, function, definition, (input, weight, target, *biases), grads, names, terms)


@torch.no_grad()
def _terms(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, grad: Tensor) -> dict[str, Tensor]:
    """What nearly cancels, in float64: in the loss the largest logit; in a gradient the softmax, which moves by
    p · |logit| · eps when logits are rounded, and the target's share, times the other factor."""
    input, weight = input.double(), weight.double()
    keep = target != IGNORE
    logits = F.linear(input, weight, None if bias is None else bias.double())
    largest = logits.abs().amax(-1)
    shares = logits.softmax(-1).mul_((1 + largest)[:, None])
    shares.scatter_add_(1, target.clamp(min=0)[:, None], torch.ones_like(shares[:, :1]))
    shares.mul_((keep * grad.double())[:, None])
    return {
        "loss": largest * keep,
        "grad_input": shares @ weight.abs(),
        "grad_weight": shares.t() @ input.abs(),
        "grad_bias": shares.sum(0),
    }


def subjects(session: Session, device: torch.device, tiny: bool) -> Iterator[Subject]:
    for case in cases.TINY_HEAD if tiny else cases.GPU_HEAD:
        yield _subject(session, device, case)


def _subject(session: Session, device: torch.device, case: cases.HeadCase) -> Subject:
    maker = Maker(device, case.dtype)
    gated = _example(
        maker, min(case.rows, 512), case.width, case.vocabulary, case.labelled, 0.0, False, True, "contiguous"
    )
    inputs = [head_inputs(maker, case) for _ in range(2)]
    labelled = round(case.rows * case.labelled)

    def ours(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(input, weight, target, num_valid=labelled)

    others = {
        **cpu_peers.linear_cross_entropy(case.rows, case.compiled),
        **peers.linear_cross_entropy(),
    }
    subject = Subject(
        family="head",
        operator="linear_cross_entropy",
        case=str(case),
        implementation=implementation_name(LINEAR_LOGPROB.select(device, case.dtype)),
        gate=gated.judge(gated.run()),
        ours=ours,
        peers=others,
        inputs=inputs,
    )
    return with_limits(maker, case, subject, labelled)


def with_limits(maker: Maker, case: cases.HeadCase, subject: Subject, labelled: int) -> Subject:
    """``subject``, whose inputs are hidden states, weight and targets, with its calls against the products alone and
    the memory of every call."""
    one, kernels = 2.0 * labelled * case.width * case.vocabulary, {}
    for what, backward, products in (("forward", False, 1), ("forward + backward", True, 4)):
        limit = matrix_products(maker, labelled, case.width, case.vocabulary, products)
        name = f"{products} mm of the labelled rows, whole logits"
        moved = sum(tensor.nbytes for tensor in subject.inputs[0][:2]) * (3 if backward else 1)
        kernels[what] = Kernel(as_called(subject, subject.ours, backward), limit, name, moved, products * one, "FLOP")
    memory: dict[str, float | None] = {}
    if case.memory:
        others = {name: peer for name, peer in subject.peers.items() if not isinstance(peer, cpu_peers.Absent)}
        calls = {OURS: subject.ours, **others}
        memory = {name: extra_memory(maker.device, subject, call) for name, call in calls.items()}
    return replace(subject, kernels=kernels, memory=memory)


def extra_memory(device: torch.device, subject: Subject, function: Callable[..., Any]) -> float | None:
    try:
        return chip.extra_mib(device, as_called(subject, function, backward=True))
    except Exception:  # a peer that fails is a row that says so, when it is measured
        if function is subject.ours:
            raise
        return None


def head_inputs(maker: Maker, case: cases.HeadCase) -> tuple[Tensor, ...]:
    """Logits have a standard deviation of about 2."""
    with torch.device(maker.device):
        target = cases.targets(case)
    weight = maker.normal((case.vocabulary, case.width), magnitude=2 * case.width**-0.5)
    return maker.normal((case.rows, case.width)), weight, target


def matrix_products(maker: Maker, rows: int, width: int, vocabulary: int, many: int) -> Call:
    """The products alone into preallocated outputs: logits (1), or logits twice and both gradients (4)."""
    input = maker.normal((rows, width), grad=False)
    weight = maker.normal((vocabulary, width), grad=False)
    logits = torch.zeros(rows, vocabulary, dtype=maker.dtype, device=maker.device)
    grad_input, grad_weight = torch.zeros_like(input), torch.zeros_like(weight)

    def call(_: int) -> None:
        torch.mm(input, weight.t(), out=logits)
        if many == 4:
            torch.mm(input, weight.t(), out=logits)
            torch.mm(logits.t(), input, out=grad_weight)
            torch.mm(logits, weight, out=grad_input)

    return call

"""``linear_kl`` for the GPU suite: against the same products by the vendor's library, and PyTorch with logits whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from m4ov_bench import cases, kl_loss
from m4ov_bench.gpu.example import Example, Maker
from m4ov_bench.gpu.operators.head import extra_memory, matrix_products
from m4ov_bench.peers.base import Absent, compiled_peer
from m4ov_bench.session import OURS, Kernel, Session, Subject, as_called, implementation_name
from m4ov_kernels.head import LINEAR_KL, linear_kl, reference

# rows, widths, vocabulary, share of rows that count, kind, temperature, numerics, biases, is num_valid given, layout
_EXAMPLES = (
    (33, 128, 64, 1000, 1.0, "forward", 1.0, "fp32", False, True, "contiguous"),
    (33, 128, 128, 1000, 0.5, "reverse", 0.7, "fp32", False, False, "contiguous"),
    (257, 512, 256, 4097, 0.7, "jsd", 1.0, "fp32", True, True, "contiguous"),
    (257, 512, 256, 4097, 1.0, "forward", 1.3, "hf", True, True, "contiguous"),
    (130, 256, 256, 3000, 1.0, "reverse", 1.0, "hf", False, True, "contiguous"),
    (130, 256, 512, 3000, 1.0, "jsd", 0.8, "fp32", False, False, "contiguous"),
    (5, 65, 33, 17, 1.0, "reverse", 1.0, "fp32", True, False, "offset"),
    (64, 96, 64, 2050, 0.5, "forward", 1.0, "fp32", False, True, "wide rows"),
    (6, 64, 64, 150, 0.0, "jsd", 1.0, "fp32", False, True, "contiguous"),
    (0, 64, 64, 150, 1.0, "forward", 1.0, "fp32", False, False, "contiguous"),
    (512, 2048, 1024, 151936, 0.5, "reverse", 1.0, "fp32", False, False, "contiguous"),
    (256, 2048, 2048, 151936, 1.0, "jsd", 1.0, "fp32", False, True, "contiguous"),
)
_TINY_EXAMPLES = (
    (7, 16, 16, 40, 0.5, "forward", 1.0, "fp32", False, True, "contiguous"),
    (5, 17, 8, 33, 0.5, "reverse", 0.7, "fp32", True, False, "wide rows"),
    (6, 16, 8, 40, 1.0, "jsd", 1.0, "fp32", False, False, "contiguous"),
    (0, 16, 16, 33, 1.0, "forward", 1.0, "fp32", False, False, "contiguous"),
)


def examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    for case in _TINY_EXAMPLES if tiny else _EXAMPLES:
        yield _example(maker, *case)


def _example(
    maker: Maker,
    rows: int,
    width: int,
    ref_width: int,
    vocabulary: int,
    share: float,
    kind: str,
    temperature: float,
    numerics: str,
    bias: bool,
    known: bool,
    layout: str,
) -> Example:
    learned = [maker.normal((rows, width), layout), maker.normal((vocabulary, width), layout, width**-0.5)]
    constants = [
        maker.normal((rows, ref_width), layout, grad=False),
        maker.normal((vocabulary, ref_width), layout, ref_width**-0.5, grad=False),
    ]
    biases = [maker.normal((vocabulary,)), maker.normal((vocabulary,), grad=False)] if bias else []
    mask = torch.zeros(rows, dtype=torch.bool, device=maker.device)
    mask[torch.randperm(rows, device=maker.device)[: round(rows * share)]] = True
    num_valid = round(rows * share) if known else None
    grad = torch.rand(rows, device=maker.device) + 0.5

    def function(hidden: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor, *biases: Tensor) -> Tensor:
        own, others = biases or (None, None)
        return linear_kl(
            hidden,
            weight,
            other,
            other_weight,
            bias=own,
            ref_bias=others,
            kind=kind,
            temperature=temperature,
            mask=mask,
            num_valid=num_valid,
            numerics=numerics,
        )

    def definition(hidden: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor, *biases: Tensor) -> Tensor:
        own, others = biases or (None, None)
        options = (own, others, mask, kind, temperature, numerics == "hf")
        return reference.linear_kl(hidden, weight, other, other_weight, *options)

    title = f"M {rows}, D {width}, Dr {ref_width}, V {vocabulary}, {share:.0%} count, {layout}, {kind}, {numerics}"
    title += f", temperature {temperature}" * (temperature != 1) + ", bias" * bias + ", num_valid" * known
    names = ("divergence", "grad_hidden_states", "grad_weight", *(["grad_bias"] if bias else []))
    inputs = (*learned, *constants, *biases)
    terms = _terms(inputs, mask, grad, kind, temperature, numerics == "hf")
    return Example(title, function, definition, inputs, (grad,), names, terms)


@torch.no_grad()
def _terms(
    inputs: tuple[Tensor, ...], mask: Tensor, grad: Tensor, kind: str, temperature: float, rounded: bool
) -> dict[str, Tensor]:
    """What nearly cancels, in float64: logits in a divergence; in a gradient the shares of the words, which move by
    p · |logit| · eps where logits are rounded, times what lies between the logarithms and the other factor."""
    dtype = inputs[0].dtype
    hidden, weight, other, other_weight, *biases = (tensor.double() for tensor in inputs)
    logs, largest = [], torch.zeros_like(grad, dtype=torch.float64)
    for states, matrix, bias in ((hidden, weight, biases[:1]), (other, other_weight, biases[1:])):
        logits = (states @ matrix.t() + (bias[0] if bias else 0.0)) / temperature
        largest = torch.maximum(largest, logits.abs().amax(-1)) if logits.numel() else largest
        logs.append(logits.log_softmax(-1))
    log_p, log_q = logs
    p, q = log_p.exp(), log_q.exp()
    gap = (log_p - log_q).abs()
    mean = ((p + q) * gap).sum(-1, keepdim=True)
    shares = p + q if kind == "forward" else p * (1 + gap + mean)
    shares *= ((1 + largest) if rounded else 1.0 + 0.0 * largest)[:, None]
    shares *= (grad.double() * mask / temperature)[:, None]
    size = largest * (1 + mean[:, 0]) * mask
    if rounded:
        size = size * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    return {
        "divergence": size,
        "grad_hidden_states": shares @ weight.abs(),
        "grad_weight": shares.t() @ hidden.abs(),
        "grad_bias": shares.sum(0),
    }


def subjects(session: Session, device: torch.device, tiny: bool) -> Iterator[Subject]:
    for case in cases.TINY_KL if tiny else cases.GPU_KL:
        yield _subject(device, case)


def _inputs(maker: Maker, case: cases.KlCase) -> tuple[Tensor, ...]:
    """Two heads near one another; logits have a standard deviation of about 2."""
    hidden = maker.normal((case.rows, case.width))
    weight = maker.normal((case.vocabulary, case.width), magnitude=2 * case.width**-0.5)
    near = hidden.detach() + 0.2 * torch.randn_like(hidden)
    return hidden, weight, near, weight.detach().clone()


def _subject(device: torch.device, case: cases.KlCase) -> Subject:
    maker = Maker(device, case.dtype)
    rows = min(case.rows, 256)
    gated = _example(
        maker, rows, case.width, case.width, case.vocabulary, 1.0, case.kind, 1.0, "fp32", False, False, "contiguous"
    )
    plain = partial(kl_loss.eager, case.kind)
    subject = Subject(
        family="head",
        operator="linear_kl",
        case=str(case),
        implementation=implementation_name(LINEAR_KL.select(device, case.dtype)),
        gate=gated.judge(gated.run()),
        ours=partial(kl_loss.ours, case.kind),
        peers={"eager": plain, "torch.compile": compiled_peer(plain, case.compiled)},
        inputs=[_inputs(maker, case) for _ in range(2)],
    )
    one = 2.0 * case.rows * case.width * case.vocabulary
    passes, kernels = 4 if case.kind == "jsd" else 2, {}
    sizes = (maker, case.rows, case.width, case.vocabulary)
    logits, gradients = matrix_products(*sizes, 1), matrix_products(*sizes, 4)
    for what, backward in (("forward", False), ("forward + backward", True)):

        def limit(index: int, backward: bool = backward) -> None:
            for _ in range(passes):
                logits(index)
            if backward:
                gradients(index)

        many = passes + 4 * backward
        moved = sum(tensor.nbytes for tensor in subject.inputs[0]) * (2 if backward else 1)
        call = as_called(subject, subject.ours, backward)
        kernels[what] = Kernel(call, limit, f"{many} mm, whole logits", moved, many * one, "FLOP")
    memory: dict[str, float | None] = {}
    if case.memory:
        others = {name: peer for name, peer in subject.peers.items() if not isinstance(peer, Absent)}
        memory = {name: extra_memory(device, subject, call) for name, call in {OURS: subject.ours, **others}.items()}
    return replace(subject, kernels=kernels, memory=memory)

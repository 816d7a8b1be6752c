"""``linear_logprob`` for the GPU suite, as ``head.py`` has ``linear_cross_entropy``: against the same products by the
vendor's library, and the same peers, which give the mean of these log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from m4ov_bench import cases
from m4ov_bench import peers as cpu_peers
from m4ov_bench.gpu import peers
from m4ov_bench.gpu.example import Example, Maker
from m4ov_bench.gpu.operators.head import IGNORE, head_inputs, with_limits
from m4ov_bench.session import Session, Subject, implementation_name
from m4ov_kernels.head import linear_logprob, reference
from m4ov_kernels.head.logprob import LINEAR_LOGPROB

# rows, width, vocabulary, share of labelled rows, temperature, numerics, bias, whether num_valid is given, layout
_EXAMPLES = (
    (33, 128, 1000, 0.5, 1.0, "fp32", False, True, "contiguous"),
    (33, 128, 1000, 0.5, 0.7, "fp32", False, False, "contiguous"),
    (257, 512, 4097, 0.7, 1.0, "fp32", True, True, "contiguous"),
    (257, 512, 4097, 1.0, 1.3, "hf", True, True, "contiguous"),
    (130, 256, 3000, 1.0, 1.0, "hf", False, True, "contiguous"),
    (5, 65, 17, 1.0, 1.0, "fp32", True, False, "offset"),
    (64, 96, 2050, 0.5, 1.0, "fp32", False, True, "wide rows"),
    (6, 64, 150, 0.0, 1.0, "fp32", False, True, "contiguous"),
    (0, 64, 150, 1.0, 1.0, "fp32", False, False, "contiguous"),
    (1024, 2048, 151936, 0.25, 1.0, "fp32", False, False, "contiguous"),
    (512, 2048, 151936, 1.0, 1.0, "fp32", False, True, "contiguous"),
)
_TINY_EXAMPLES = (
    (7, 16, 40, 0.5, 1.0, "fp32", False, True, "contiguous"),
    (5, 17, 33, 0.5, 0.7, "fp32", True, False, "wide rows"),
    (0, 16, 33, 1.0, 1.0, "fp32", False, False, "contiguous"),
)
_FOUND = ("logprob", "logsumexp", "entropy")


def examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    for case in _TINY_EXAMPLES if tiny else _EXAMPLES:
        yield _example(maker, *case)


def _example(
    maker: Maker,
    rows: int,
    width: int,
    vocabulary: int,
    labelled: float,
    temperature: float,
    numerics: str,
    bias: bool,
    known: bool,
    layout: str,
) -> Example:
    hidden = maker.normal((rows, width), layout)
    weight = maker.normal((vocabulary, width), layout, width**-0.5)
    with torch.device(maker.device):
        targets = cases.targets(cases.HeadCase(rows, width, vocabulary, maker.dtype, labelled))
    num_valid = round(rows * labelled) if known else None
    biases = (maker.normal((vocabulary,)),) if bias else ()
    grads = tuple(torch.rand(rows, device=maker.device) + 0.5 for _ in _FOUND)

    def function(hidden: Tensor, weight: Tensor, targets: Tensor, *bias: Tensor) -> tuple[Tensor | None, ...]:
        found = linear_logprob(
            hidden,
            weight,
            targets,
            bias=bias[0] if bias else None,
            temperature=temperature,
            ignore_index=IGNORE,
            entropy=True,
            num_valid=num_valid,
            numerics=numerics,
        )
        return found.logprob, found.logsumexp, found.entropy

    def definition(hidden: Tensor, weight: Tensor, targets: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        given = bias[0] if bias else None
        rounded = numerics == "hf"
        return reference.linear_logprob(
            hidden, weight, targets, given, None, temperature, 0.0, IGNORE, rounded, 0
        )[:3]  # fmt: skip

    title = f"M {rows}, D {width}, V {vocabulary}, {labelled:.0%} labelled, {layout}, {numerics}"
    title += f", temperature {temperature}" * (temperature != 1) + ", bias" * bias + ", num_valid" * known
    names = (*_FOUND, "grad_hidden_states", "grad_weight", *(["grad_bias"] if bias else []))
    terms = _terms(hidden, weight, targets, biases[0] if bias else None, grads, temperature, numerics == "hf")
    return Example(title, function, definition, (hidden, weight, targets, *biases), grads, names, terms)


@torch.no_grad()
def _terms(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    grads: tuple[Tensor, ...],
    temperature: float,
    rounded: bool,
) -> dict[str, Tensor]:
    """What nearly cancels, in float64: logits in a log-probability; in a gradient the shares of the softmax, which move
    by p · |logit| · eps where logits are rounded, and of the target, times the other factor."""
    hidden, weight = hidden.double(), weight.double()
    keep = targets != IGNORE
    logits = (hidden @ weight.t() + (0.0 if bias is None else bias.double())) / temperature
    largest = logits.abs().amax(-1) if logits.numel() else logits.new_zeros(len(hidden))
    log_p = logits.log_softmax(-1)
    of_logprob, of_logsumexp, of_entropy = ((grad.double() * keep)[:, None] for grad in grads)
    shares = log_p.exp()
    entropy = -(shares * log_p).sum(-1, keepdim=True)
    shares *= of_logprob + of_logsumexp + of_entropy * (log_p.abs() + entropy)
    if rounded:
        shares *= (1 + largest)[:, None]
    shares.scatter_add_(1, targets.clamp(min=0)[:, None], of_logprob.expand(-1, 1).contiguous())
    shares /= temperature
    return {
        "logprob": largest * keep,
        "logsumexp": largest * keep,
        "entropy": (largest if rounded else entropy[:, 0]) * keep,
        "grad_hidden_states": shares @ weight.abs(),
        "grad_weight": shares.t() @ hidden.abs(),
        "grad_bias": shares.sum(0),
    }


def subjects(session: Session, device: torch.device, tiny: bool) -> Iterator[Subject]:
    for case in cases.TINY_HEAD if tiny else cases.GPU_LOGPROB:
        yield _subject(device, case)


def _subject(device: torch.device, case: cases.HeadCase) -> Subject:
    maker = Maker(device, case.dtype)
    rows = min(case.rows, 512)
    gated = _example(
        maker, rows, case.width, case.vocabulary, case.labelled, 1.0, "fp32", False, True, "contiguous"
    )  # fmt: skip
    inputs = [head_inputs(maker, case) for _ in range(2)]
    labelled = round(case.rows * case.labelled)

    def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -linear_logprob(hidden, weight, targets, num_valid=labelled).logprob.sum() / labelled

    others = {**cpu_peers.linear_cross_entropy(case.rows, case.compiled), **peers.linear_cross_entropy()}
    subject = Subject(
        family="head",
        operator="linear_logprob",
        case=str(case),
        implementation=implementation_name(LINEAR_LOGPROB.select(device, case.dtype)),
        gate=gated.judge(gated.run()),
        ours=ours,
        peers=others,
        inputs=inputs,
    )
    return with_limits(maker, case, subject, labelled)

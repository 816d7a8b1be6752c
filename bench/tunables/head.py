"""Tunable kernels of the head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_bench import gate
from m4ov_bench.tunables.problem import Problem, Size, Tunable, blocks, poison, randn
from m4ov_kernels.head import chunked
from m4ov_kernels.head import triton as head


def _cross_entropy_fwd(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
    rows = max(2, size.elements // width)
    logits = randn((rows, width), dtype, device)
    target = torch.randint(width, (rows,), device=device)
    state = torch.empty(4, rows, device=device)

    def prepare() -> None:
        state.zero_()
        state[0] = float("-inf")

    def judged(values: Tensor) -> list[Tensor]:
        return [values.logsumexp(-1), values.gather(1, target[:, None])[:, 0]]

    return Problem(
        prepare,
        lambda: head.EPILOGUE.reduce(logits, target, 0, state, False),
        lambda: (state[1].log() + state[0], state[2]),
        ("logsumexp", "target's logit"),
        judged(logits.float()),
        judged(logits.double()),
    )


def _cross_entropy_bwd(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
    rows = max(2, size.elements // width)
    logits = randn((rows, width), dtype, device)
    target = torch.randint(width, (rows,), device=device)
    maximum = logits.amax(-1).float()
    log_sum = (logits.double() - maximum[:, None]).logsumexp(-1)
    normalizer = torch.stack([maximum, log_sum.float()], -1).contiguous()
    grad_loss = torch.rand(rows, device=device) + 0.5
    gradient = torch.empty_like(logits)

    def judged(values: Tensor) -> list[Tensor]:
        wide = torch.promote_types(values.dtype, torch.float32)  # as the reference computes it

        def loss(x: Tensor) -> Tensor:
            return F.cross_entropy(x.to(wide), target, reduction="none")

        return gate.differentiated(loss, [values.detach().requires_grad_()], [grad_loss.to(wide)])[1:]

    return Problem(
        lambda: poison([gradient]),
        lambda: head.EPILOGUE.differentiate(logits, gradient, target, 0, normalizer, grad_loss, 1.0, 0.0),
        lambda: (gradient,),
        ("gradient",),
        judged(logits),
        judged(logits.double()),
    )


def _accumulate(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
    addend = randn((size.elements,), dtype, device)
    accumulator = torch.randn(size.elements + chunked.ACCUMULATOR_ALIGN, device=device)
    out = torch.empty_like(addend)
    held = accumulator[: size.elements]
    return Problem(
        lambda: poison([out]),
        lambda: head.EPILOGUE.add(accumulator, addend, out, False),
        lambda: (out,),
        ("sum",),
        [(held + addend.float()).to(dtype)],
        [held.double() + addend.double()],
    )


TUNABLES = (
    # A chunk of the vocabulary is a multiple of CPU_COLUMNS, which the forward's block must divide.
    Tunable("cross_entropy_fwd", blocks("BLOCK", 2048, 1024, 512), _cross_entropy_fwd),
    Tunable("cross_entropy_bwd", blocks("BLOCK", 2048, 1024, 4096, 8192), _cross_entropy_bwd),
    Tunable("accumulate", blocks("BLOCK", 1024, 2048, 4096, 8192), _accumulate),
)

"""``varlen_attention`` for the GPU suite: the door to other packages' kernels there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from m4ov_bench import attention, cases
from m4ov_bench.gpu import peers
from m4ov_bench.gpu.example import Example, Maker
from m4ov_bench.session import Session, Subject
from m4ov_kernels import varlen_attention
from m4ov_kernels.attention import reference

_SHAPES = (  # lengths, heads, key heads, head dimension, layout
    ((37, 64, 1), (4, 2), 64, "contiguous"),
    ((300, 0, 5), (16, 8), 128, "wide rows"),
    ((1025,), (3, 3), 72, "transposed"),
    ((129, 128), (5, 1), 33, "offset"),
    ((4, 7, 9) * 50, (2, 2), 96, "contiguous"),
)
_TINY_SHAPES = (((5, 3), (2, 1), 8, "contiguous"), ((4, 0, 1), (2, 2), 7, "wide rows"))


def examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    for number, shape in enumerate(_TINY_SHAPES if tiny else _SHAPES):
        for causal in (True, False) if number == 0 else (number % 2 == 0,):
            yield _example(maker, *shape, causal)


def _example(
    maker: Maker, sizes: tuple[int, ...], heads: tuple[int, int], dim: int, layout: str, causal: bool
) -> Example:
    bounds = torch.tensor([0, *sizes], device=maker.device).cumsum(0).to(torch.int32)
    shapes = [(sum(sizes), many, dim) for many in (heads[0], heads[1], heads[1])]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, bounds, causal=causal, max_seqlen=max(sizes))

    def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.varlen_attention(q, k, v, bounds, None, causal, dim**-0.5)

    return Example(
        f"{len(sizes)} sequences to {max(sizes)}, {heads[0]}/{heads[1]} heads of {dim}, {layout}" + ", causal" * causal,
        function,
        definition,
        tuple(maker.normal(shape, layout) for shape in shapes),
        (maker.normal(shapes[0], layout, grad=False),),
        ("output", "grad_q", "grad_k", "grad_v"),
    )


def subjects(session: Session, device: torch.device, tiny: bool) -> Iterator[Subject]:
    for case in cases.TINY_ATTENTION if tiny else cases.GPU_ATTENTION:
        with torch.device(device):
            made = attention.subject(case, case.compiled)
        yield replace(made, peers={**made.peers, **peers.varlen_attention(case.sizes, case.causal, device)})

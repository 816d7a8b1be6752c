"""``qk_norm_mrope`` and ``vision_rope`` for the GPU suite."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from m4ov_bench import cases, rope
from m4ov_bench.gpu.example import Example, Maker
from m4ov_bench.session import Session, Subject
from m4ov_kernels import qk_norm_mrope, vision_rope
from m4ov_kernels.rope import reference as rope_reference
from m4ov_kernels.vision import reference as vision_reference

EPS = 1e-6
NUMERICS = ("hf", "vllm", "fp32")
# tokens, heads, key heads, width, rotary width, layout, weights, sections, interleaved
_SHAPES = (
    ((301,), 32, 8, 128, 128, "contiguous", True, (24, 20, 20), True),
    ((2, 77), 28, 4, 128, 128, "wide rows", False, (16, 24, 24), False),
    ((130,), 5, 3, 64, 64, "transposed", True, None, False),
    ((65,), 9, 1, 80, 40, "every other", True, (8, 6, 6), True),
    ((33,), 2, 2, 1024, 1024, "contiguous", True, (200, 156, 156), True),
    ((0,), 4, 2, 64, 64, "contiguous", True, (12, 10, 10), True),
    ((2000,), 16, 8, 128, 128, "offset", True, (24, 20, 20), True),
)
_TINY_SHAPES = (
    ((5,), 3, 2, 16, 16, "contiguous", True, (4, 2, 2), True),
    ((2, 2), 2, 1, 10, 6, "wide rows", True, None, False),
    ((0,), 1, 1, 8, 8, "contiguous", False, (2, 1, 1), False),
)
_VISION = (
    ([[1, 32, 40], [3, 8, 6]], 16, 72, "contiguous"),
    ([[1, 64, 64]], 16, 80, "wide rows"),
    ([[1, 2, 2]] * 150, 4, 64, "transposed"),
)
_TINY_VISION = (([[1, 2, 4], [2, 2, 2]], 2, 8, "contiguous"), ([[1, 2, 2]], 3, 12, "wide rows"))
_END = 2**24  # of the positions


def examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    shapes = _TINY_SHAPES if tiny else _SHAPES
    for numerics in NUMERICS:
        yield _example(maker, numerics, *shapes[0])
    for shape in shapes[1:]:
        yield _example(maker, random.choice(NUMERICS), *shape)


def _example(
    maker: Maker,
    numerics: str,
    tokens: tuple[int, ...],
    heads: int,
    kv_heads: int,
    dim: int,
    rotary_dim: int,
    layout: str,
    norm: bool,
    sections: Sequence[int] | None,
    interleaved: bool,
) -> Example:
    inputs = [maker.normal((*tokens, count, dim), layout) for count in (heads, kv_heads)]
    inputs += [maker.normal((dim,)) for _ in range(2 * norm)]
    grads = tuple(maker.normal((*tokens, count, dim), layout, grad=False) for count in (heads, kv_heads))
    axes = () if sections is None else (3,)
    positions = torch.randint(0, _END, (*axes, *tokens), device=maker.device)

    def function(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return qk_norm_mrope(
            q, k, *(weights or (None, None)), positions, mrope_section=sections, theta=5e6, eps=EPS,
            interleaved=interleaved, rotary_dim=rotary_dim, numerics=numerics,
        )  # fmt: skip

    def definition(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        options = (list(sections or ()), 5e6, EPS, interleaved, rotary_dim, numerics)
        return rope_reference.qk_norm_mrope(q, k, *(weights or (None, None)), positions, *options)

    names = ("q_turned", "k_turned", "grad_q", "grad_k", *("grad_q_weight", "grad_k_weight")[: 2 * norm])
    title = f"{list(tokens)}, {heads}/{kv_heads} heads of {dim}, {layout}, {numerics}" + ", no norm" * (not norm)
    return Example(title, function, definition, tuple(inputs), grads, names)


def vision_examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    for i, (sizes, heads, dim, layout) in enumerate(_TINY_VISION if tiny else _VISION):
        grid = torch.tensor(sizes, device=maker.device)
        patches = int(grid.prod(1).sum())
        inputs = tuple(maker.normal((patches, heads, dim), layout) for _ in range(2))
        grads = tuple(maker.normal((patches, heads, dim), layout, grad=False) for _ in range(2))
        numerics = "fp32" if i == 1 else "hf"

        def function(q: Tensor, k: Tensor, grid: Tensor = grid, numerics: str = numerics) -> tuple[Tensor, Tensor]:
            return vision_rope(q, k, grid, merge_size=2, numerics=numerics)

        def definition(q: Tensor, k: Tensor, grid: Tensor = grid, numerics: str = numerics) -> tuple[Tensor, Tensor]:
            return vision_reference.vision_rope(q, k, grid, None, 2, 1e4, numerics)

        names = ("q_turned", "k_turned", "grad_q", "grad_k")
        title = f"{len(sizes)} images, {patches} patches, {heads} heads of {dim}, {layout}, {numerics}"
        yield Example(title, function, definition, inputs, grads, names)


def subjects(session: Session, device: torch.device, tiny: bool) -> Iterator[Subject]:
    for case in cases.TINY_ROPE if tiny else cases.GPU_ROPE:
        with torch.device(device):
            yield rope.subject(case, case.compiled)


def vision_subjects(session: Session, device: torch.device, tiny: bool) -> Iterator[Subject]:
    for case in cases.TINY_VISION_ROPE if tiny else cases.GPU_VISION_ROPE:
        with torch.device(device):
            yield rope.vision_subject(case, case.compiled)

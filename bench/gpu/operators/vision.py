"""The vision operators for the GPU suite."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from m4ov_bench import cases, vision
from m4ov_bench.gpu.example import Example, Maker
from m4ov_bench.session import Session, Subject
from m4ov_kernels import deepstack_add, interpolate_position_embeddings, scatter_vision
from m4ov_kernels.vision import reference

# shape of the rows, share of them that take a feature, layout
_ROWS = (
    ((37, 2048), 0.75, "contiguous"),
    ((3, 5, 4096), 0.5, "wide rows"),
    ((4, 16, 128), 1.0, "transposed"),
    ((1025, 130), 0.3, "offset"),
    ((9, 5120), 0.0, "every other"),
    ((5, 1), 0.6, "contiguous"),
    ((0, 64), 1.0, "contiguous"),
    ((20000, 256), 0.75, "contiguous"),
)
_TINY_ROWS = (((5, 32), 0.6, "contiguous"), ((2, 3, 33), 0.5, "wide rows"), ((0, 16), 1.0, "contiguous"))
# grids, side of the table, width, layout
_GRIDS = (
    (((1, 12, 16), (2, 4, 6)), 7, 128, "contiguous"),
    (((1, 64, 50), (1, 2, 2), (3, 8, 6)), 48, 1152, "wide rows"),
    (((1, 2, 200), (1, 100, 4)), 48, 130, "offset"),
    (((1, 4, 4),) * 130, 5, 64, "transposed"),
    (((40, 6, 4),), 1, 33, "every other"),
    ((), 3, 64, "contiguous"),
    (((1, 128, 96), (16, 24, 42)), 48, 1152, "contiguous"),
)
_TINY_GRIDS = ((((1, 2, 4), (2, 2, 2)), 3, 32, "contiguous"), (((1, 4, 2),), 2, 33, "wide rows"), ((), 3, 16, "offset"))


def scatter_examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    for case in _TINY_ROWS if tiny else _ROWS:
        yield _rows_example(maker, *case, scatter_vision, reference.scatter_vision)


def deepstack_examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    for case in _TINY_ROWS if tiny else _ROWS:
        yield _rows_example(maker, *case, deepstack_add, reference.deepstack_add)


def _rows_example(
    maker: Maker,
    shape: tuple[int, ...],
    share: float,
    layout: str,
    operator: Callable[..., Tensor],
    define: Callable[..., Tensor],
) -> Example:
    rows = torch.Size(shape[:-1]).numel()
    positions = torch.randperm(rows, device=maker.device)[: round(rows * share)]
    return Example(
        f"{list(shape)}, {len(positions)} features, {layout}",
        lambda base, features: operator(base, features, positions),
        lambda base, features: define(base, features, positions),
        (maker.normal(shape, layout), maker.normal((len(positions), shape[-1]), layout)),
        (maker.normal(shape, layout, grad=False),),
        ("output", "grad_base", "grad_features"),
    )


def interpolate_examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    for case in _TINY_GRIDS if tiny else _GRIDS:
        for numerics in ("hf", "fp32"):
            yield _grids_example(maker, *case, numerics, on_host=random.random() < 0.5)


def _grids_example(
    maker: Maker,
    grids: tuple[tuple[int, int, int], ...],
    side: int,
    width: int,
    layout: str,
    numerics: str,
    on_host: bool,
) -> Example:
    grid_thw = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
    patches = int(grid_thw.prod(1).sum())
    grid_thw = grid_thw if on_host else grid_thw.to(maker.device)

    def function(table: Tensor, hidden_states: Tensor) -> Tensor:
        return interpolate_position_embeddings(
            table, grid_thw, merge_size=2, hidden_states=hidden_states, numerics=numerics
        )

    def definition(table: Tensor, hidden_states: Tensor) -> Tensor:
        return reference.interpolate_position_embeddings(table, grid_thw, hidden_states, patches, 2, numerics)

    table, hidden = maker.normal((side * side, width)), maker.normal((patches, width), layout)
    grad = maker.normal((patches, width), layout, grad=False)
    # A place of the table takes from many patches, whose gradients may cancel.
    leaf = torch.zeros_like(table, dtype=torch.float64).requires_grad_()
    alone = reference.interpolate_position_embeddings(leaf, grid_thw, None, patches, 2, numerics)
    terms = torch.autograd.grad(alone, leaf, grad.double().abs())[0]
    return Example(
        f"{len(grids)} grids, {patches} patches, S {side}, D {width}, {layout}, {numerics}"
        + ", grids on the host" * on_host,
        function,
        definition,
        (table, hidden),
        (grad,),
        ("output", "grad_table", "grad_hidden_states"),
        {"grad_table": terms},
    )


def _rows_subjects(add: bool) -> Callable[..., Iterator[Subject]]:
    def subjects(session: Session, device: torch.device, tiny: bool) -> Iterator[Subject]:
        for case in cases.TINY_FEATURE_ROWS if tiny else cases.GPU_FEATURE_ROWS:
            with torch.device(device):
                yield vision.feature_rows(case, add, case.compiled)

    return subjects


scatter_subjects: Callable[..., Any] = _rows_subjects(add=False)
deepstack_subjects: Callable[..., Any] = _rows_subjects(add=True)


def interpolate_subjects(session: Session, device: torch.device, tiny: bool) -> Iterator[Subject]:
    for case in cases.TINY_POSITION_EMBEDDINGS if tiny else cases.GPU_POSITION_EMBEDDINGS:
        with torch.device(device):
            yield vision.interpolation(case, case.compiled)

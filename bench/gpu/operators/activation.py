"""``swiglu`` for the GPU suite."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from m4ov_bench import activation, cases
from m4ov_bench.gpu import peers
from m4ov_bench.gpu.example import Example, Maker
from m4ov_bench.session import Session, Subject
from m4ov_kernels import swiglu
from m4ov_kernels.activation import reference

NUMERICS = ("hf", "vllm", "fp32")
_SHAPES = (
    ((37, 6144), "contiguous", 1.0),
    ((3, 5, 4096), "wide rows", 30.0),
    ((4, 16, 128), "transposed", 1.0),
    ((1025, 130), "offset", 2000.0),
    ((9, 5120), "every other", 1e-4),
    ((7,), "contiguous", 1.0),
    ((5, 1), "wide rows", 1.0),
    ((0, 64), "contiguous", 1.0),
    ((130, 16387), "contiguous", 1.0),
    ((20000, 256), "wide rows", 1.0),
)
_TINY_SHAPES = (((5, 32), "contiguous", 1.0), ((2, 3, 33), "wide rows", 30.0), ((0, 16), "contiguous", 1.0))


def examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    shapes = _TINY_SHAPES if tiny else _SHAPES
    for numerics in NUMERICS:
        yield _example(maker, *shapes[0], numerics)
    for shape in shapes[1:]:
        yield _example(maker, *shape, random.choice(NUMERICS))


def _example(maker: Maker, shape: tuple[int, ...], layout: str, magnitude: float, numerics: str) -> Example:
    def function(gate: Tensor, up: Tensor) -> Tensor:
        return swiglu(gate, up, numerics=numerics)

    def definition(gate: Tensor, up: Tensor) -> Tensor:
        return reference.swiglu(gate, up, numerics)

    return Example(
        f"{list(shape)}, {layout}, × {magnitude:g}, {numerics}",
        function,
        definition,
        (maker.normal(shape, layout, magnitude), maker.normal(shape, layout)),
        (maker.normal(shape, layout, grad=False),),
        ("output", "grad_gate", "grad_up"),
    )


def subjects(session: Session, device: torch.device, tiny: bool) -> Iterator[Subject]:
    for case in cases.TINY_ACTIVATION if tiny else cases.GPU_ACTIVATION:
        with torch.device(device):
            made = activation.subject(case, case.compiled)
        yield replace(made, peers={**made.peers, **peers.swiglu()})

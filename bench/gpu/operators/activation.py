"""The activations for the GPU suite."""

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
from m4ov_kernels import geglu, gelu, swiglu
from m4ov_kernels.activation import reference

NUMERICS = ("hf", "vllm", "fp32")
APPROXIMATIONS = ("tanh", "none")
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


def geglu_examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    for shape in _TINY_SHAPES if tiny else _SHAPES:
        for approximate in APPROXIMATIONS:
            yield _geglu_example(maker, *shape, approximate, random.choice(NUMERICS))


def _geglu_example(
    maker: Maker, shape: tuple[int, ...], layout: str, magnitude: float, approximate: str, numerics: str
) -> Example:
    return Example(
        f"{list(shape)}, {layout}, × {magnitude:g}, {approximate}, {numerics}",
        lambda gate, up: geglu(gate, up, approximate=approximate, numerics=numerics),
        lambda gate, up: reference.geglu(gate, up, approximate, numerics),
        (maker.normal(shape, layout, magnitude), maker.normal(shape, layout)),
        (maker.normal(shape, layout, grad=False),),
        ("output", "grad_gate", "grad_up"),
    )


def gelu_examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    for shape in _TINY_SHAPES if tiny else _SHAPES:
        for approximate in APPROXIMATIONS:
            for bias in (True, False):
                yield _gelu_example(maker, *shape, approximate, bias)


def _gelu_example(
    maker: Maker, shape: tuple[int, ...], layout: str, magnitude: float, approximate: str, bias: bool
) -> Example:
    vectors = [maker.normal(shape[-1:], "contiguous")] if bias else []
    return Example(
        f"{list(shape)}, {layout}, × {magnitude:g}, {approximate}" + ", bias" * bias,
        lambda input, bias=None: gelu(input, bias=bias, approximate=approximate),
        lambda input, bias=None: reference.gelu(input, bias, approximate),
        (maker.normal(shape, layout, magnitude), *vectors),
        (maker.normal(shape, layout, grad=False),),
        ("output", "grad_input", "grad_bias")[: 2 + bias],
    )


def subjects(session: Session, device: torch.device, tiny: bool) -> Iterator[Subject]:
    yield from _subjects("swiglu", device, tiny)


def geglu_subjects(session: Session, device: torch.device, tiny: bool) -> Iterator[Subject]:
    yield from _subjects("geglu", device, tiny)


def gelu_subjects(session: Session, device: torch.device, tiny: bool) -> Iterator[Subject]:
    yield from _subjects("gelu", device, tiny)


def _subjects(operator: str, device: torch.device, tiny: bool) -> Iterator[Subject]:
    for case in cases.TINY_ACTIVATION if tiny else cases.GPU_ACTIVATION:
        if (case.operator if isinstance(case, cases.GatedCase) else "gelu") != operator:
            continue
        with torch.device(device):
            made = activation.subject(case, case.compiled)
        libraries = {"swiglu": peers.swiglu, "geglu": peers.geglu}.get(operator, dict)
        yield replace(made, peers={**made.peers, **libraries()})

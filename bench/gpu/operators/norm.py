"""The norms for the GPU suite."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from m4ov_bench import cases, norm
from m4ov_bench.gpu import peers
from m4ov_bench.gpu.example import Example, Maker
from m4ov_bench.session import Session, Subject
from m4ov_kernels import layer_norm, rms_norm
from m4ov_kernels.norm import reference

EPS = 1e-6
NUMERICS = ("hf", "vllm", "fp32")
# shape, layout, magnitude. The widest are read in two passes; width 1 and 7 are no multiple of anything.
_SHAPES = (
    ((37, 2048), "contiguous", 1.0),
    ((3, 5, 4096), "wide rows", 30.0),
    ((4, 16, 128), "transposed", 1.0),
    ((1025, 130), "offset", 2000.0),
    ((9, 5120), "every other", 1e-4),
    ((7, 7), "contiguous", 1.0),
    ((5, 1), "contiguous", 1.0),
    ((0, 64), "contiguous", 1.0),
    ((2, 0, 64), "contiguous", 1.0),
    ((5, 8192), "contiguous", 1.0),
    ((5, 8193), "wide rows", 1.0),
    ((130, 16384), "contiguous", 1.0),
    ((20000, 256), "contiguous", 1.0),
)
_TINY_SHAPES = (((5, 32), "contiguous", 1.0), ((2, 3, 33), "wide rows", 30.0), ((0, 16), "contiguous", 1.0))


def examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    shapes = _TINY_SHAPES if tiny else _SHAPES
    for residual in (False, True):
        for numerics in NUMERICS:
            yield _example(maker, *shapes[0], residual, numerics)
    for shape in shapes[1:]:
        yield _example(maker, *shape, random.random() < 0.5, random.choice(NUMERICS))


def _example(
    maker: Maker, shape: tuple[int, ...], layout: str, magnitude: float, residual: bool, numerics: str
) -> Example:
    hidden = [maker.normal(shape, layout, magnitude) for _ in range(1 + residual)]
    weight = maker.normal(shape[-1:], layout)
    grads = tuple(maker.normal(shape, layout, magnitude, grad=False) for _ in range(1 + residual))

    def function(
        hidden_states: Tensor, weight: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm(hidden_states, weight, eps=EPS, residual=residual, numerics=numerics)  # type: ignore[call-overload]

    def definition(hidden_states: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        return reference.rms_norm(hidden_states, weight, EPS, residual, numerics)[: 1 if residual is None else 2]

    names = ("normed", "sum")[: 1 + residual]
    names += ("grad_hidden_states", "grad_weight", "grad_residual")[: 2 + residual]
    terms = _terms(grads[0], hidden, weight)
    return Example(
        f"{list(shape)}, {layout}, × {magnitude:g}, {numerics}" + ", residual" * residual,
        function,
        definition,
        (hidden[0], weight, *hidden[1:]),
        grads,
        names,
        {"grad_hidden_states": terms, "grad_residual": terms},
    )


def _terms(grad: Tensor, hidden: list[Tensor], weight: Tensor) -> Tensor:
    """What nearly cancels in the gradient of narrow rows; the second holds the reciprocal root three times."""
    with torch.no_grad():
        x = torch.stack([tensor.double() for tensor in hidden]).sum(0)
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        weighted = grad.double() * weight.double()
        second = x * rstd * (weighted * x * rstd).mean(-1, keepdim=True)
        return (weighted.abs() + 3 * second.abs()) * rstd


def layer_norm_examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    shapes = _TINY_SHAPES if tiny else _SHAPES
    for residual in (False, True):
        for numerics in NUMERICS:
            yield _layer_norm_example(maker, *shapes[0], residual, numerics)
    for shape in shapes[1:]:
        yield _layer_norm_example(maker, *shape, random.random() < 0.5, random.choice(("hf", "vllm")))


def _layer_norm_example(
    maker: Maker, shape: tuple[int, ...], layout: str, magnitude: float, residual: bool, numerics: str
) -> Example:
    hidden = [maker.normal(shape, layout, magnitude) for _ in range(1 + residual)]
    vectors = [maker.normal(shape[-1:], layout) for _ in range(2)]
    grads = tuple(maker.normal(shape, layout, magnitude, grad=False) for _ in range(1 + residual))

    def function(
        hidden_states: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        return layer_norm(hidden_states, weight, bias, eps=EPS, residual=residual, numerics=numerics)  # type: ignore[call-overload]

    def definition(
        hidden_states: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        outputs = reference.layer_norm(hidden_states, weight, bias, residual, EPS, numerics)
        return outputs[: 1 if residual is None else 2]

    names = ("normed", "sum")[: 1 + residual]
    names += ("grad_hidden_states", "grad_weight", "grad_bias", "grad_residual")[: 3 + residual]
    terms = _layer_norm_terms(grads, hidden, vectors[0])
    return Example(
        f"{list(shape)}, {layout}, × {magnitude:g}, {numerics}" + ", residual" * residual,
        function,
        definition,
        (hidden[0], *vectors, *hidden[1:]),
        grads,
        names,
        {"grad_hidden_states": terms, "grad_residual": terms},
    )


def _layer_norm_terms(grads: tuple[Tensor, ...], hidden: list[Tensor], weight: Tensor) -> Tensor:
    """What nearly cancels in the gradient of narrow rows; a value and the mean are rounded before they are
    subtracted."""
    with torch.no_grad():
        x = torch.stack([tensor.double() for tensor in hidden]).sum(0)
        mean = x.mean(-1, keepdim=True)
        rstd = torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + EPS)
        weighted, reach = (grads[0].double() * weight.double()).abs(), (x.abs() + mean.abs()) * rstd
        second = reach * (weighted * reach).mean(-1, keepdim=True)
        made = (weighted + weighted.mean(-1, keepdim=True) + 3 * second) * rstd
        return made + grads[1].double().abs() if len(grads) > 1 else made


def subjects(session: Session, device: torch.device, tiny: bool) -> Iterator[Subject]:
    yield from _subjects("rms_norm", device, tiny)


def layer_norm_subjects(session: Session, device: torch.device, tiny: bool) -> Iterator[Subject]:
    yield from _subjects("layer_norm", device, tiny)


def _subjects(operator: str, device: torch.device, tiny: bool) -> Iterator[Subject]:
    for case in cases.TINY_NORM if tiny else cases.GPU_NORM:
        if case.operator != operator:
            continue
        with torch.device(device):
            made = norm.subject(case, case.compiled)
        libraries = peers.rms_norm if operator == "rms_norm" else peers.layer_norm
        yield replace(made, peers={**made.peers, **libraries(EPS, case.residual)})

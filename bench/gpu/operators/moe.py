"""The mixture-of-experts operators for the GPU suite."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from m4ov_bench import cases, moe
from m4ov_bench.gpu.example import Example, Maker
from m4ov_bench.session import Session, Subject
from m4ov_kernels import grouped_linear, permute, route_topk, unpermute
from m4ov_kernels.moe import reference

# Tokens, experts, experts of a token, width, columns; layout.
_SHAPES = (
    ((37, 8, 2, 256, 192), "contiguous"),
    ((1025, 128, 8, 130, 70), "wide rows"),
    ((4096, 128, 8, 512, 384), "contiguous"),
    ((300, 60, 4, 1030, 33), "transposed"),
    ((9, 3, 3, 77, 513), "every other"),
    ((1, 128, 8, 2048, 1536), "offset"),
    ((0, 4, 2, 64, 64), "contiguous"),
)
_TINY_SHAPES = (((5, 3, 2, 32, 24), "contiguous"), ((7, 4, 2, 17, 19), "wide rows"), ((0, 3, 1, 16, 16), "offset"))


def _shapes(tiny: bool) -> tuple[tuple[tuple[int, ...], str], ...]:
    return _TINY_SHAPES if tiny else _SHAPES


def _experts(maker: Maker, tokens: int, experts: int, top_k: int) -> Tensor:
    """Some are popular, some are nobody's."""
    popularity = 1 / (1 + torch.randperm(experts).float())
    popularity[random.randrange(experts)] = 1e-6
    return torch.multinomial(popularity.expand(max(tokens, 1), -1), top_k)[:tokens].int().to(maker.device)


def grouped_examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    for (tokens, experts, top_k, width, columns), layout in _shapes(tiny):
        chosen = _experts(maker, tokens, experts, top_k)
        offsets = reference.permute(torch.zeros(tokens, 1, device=maker.device), chosen, experts)[2]
        across = random.random() < 0.5
        shape = (experts, width, columns) if across else (experts, columns, width)
        weight = maker.normal(shape, "contiguous", width**-0.5)

        def function(x: Tensor, w: Tensor, offsets: Tensor = offsets, across: bool = across) -> Tensor:
            return grouped_linear(x, w.mT if across else w, offsets)

        def definition(x: Tensor, w: Tensor, offsets: Tensor = offsets, across: bool = across) -> Tensor:
            return reference.grouped_linear(x, w.mT if across else w, offsets)

        yield Example(
            f"{tokens} tokens × {top_k} of {experts}, {width} → {columns}, {layout}" + ", across" * across,
            function,
            definition,
            (maker.normal((tokens * top_k, width), layout), weight),
            (maker.normal((tokens * top_k, columns), layout, grad=False),),
            ("output", "grad_rows", "grad_weight"),
        )


def permute_examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    for (tokens, experts, top_k, width, _), layout in _shapes(tiny):
        chosen = _experts(maker, tokens, experts, top_k)
        yield Example(
            f"{tokens} tokens × {top_k} of {experts}, H {width}, {layout}",
            lambda x, chosen=chosen, experts=experts: permute(x, chosen, experts)[0],
            lambda x, chosen=chosen, experts=experts: reference.permute(x, chosen, experts)[0],
            (maker.normal((tokens, width), layout),),
            (maker.normal((tokens * top_k, width), layout, grad=False),),
            ("rows", "grad_hidden_states"),
        )


def unpermute_examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    for (tokens, _, top_k, width, _), layout in _shapes(tiny):
        order = torch.randperm(tokens * top_k, device=maker.device).int().view(tokens, top_k)
        weights = torch.randn(tokens, top_k, device=maker.device).requires_grad_()
        yield Example(
            f"{tokens} tokens × {top_k}, H {width}, {layout}",
            lambda x, w, order=order: unpermute(x, order, w),
            lambda x, w, order=order: reference.unpermute(x, order, w),
            (maker.normal((tokens * top_k, width), layout), weights),
            (maker.normal((tokens, width), layout, grad=False),),
            ("output", "grad_rows", "grad_weights"),
        )


def route_examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    for (tokens, experts, top_k, *_), layout in _shapes(tiny):
        normalize = random.random() < 0.7

        def function(x: Tensor, top_k: int = top_k, normalize: bool = normalize) -> tuple[Tensor, Tensor]:
            weights, _, load = route_topk(x, top_k=top_k, normalize=normalize)
            return weights, load.probability

        def definition(x: Tensor, top_k: int = top_k, normalize: bool = normalize) -> tuple[Tensor, Tensor]:
            weights, _, _, probability = reference.route_topk(x, top_k, normalize)
            return weights, probability

        grads = (torch.randn(tokens, top_k, device=maker.device), torch.randn(experts, device=maker.device))
        logits = maker.normal((tokens, experts), layout)
        yield Example(
            f"{tokens} tokens, {top_k} of {experts}, {layout}" + ", normalised" * normalize,
            function,
            definition,
            (logits,),
            grads,
            ("weights", "probability", "grad_logits"),
            {"grad_logits": moe.route_terms(logits.detach(), grads, top_k, normalize)},
        )


def _subjects(operator: str) -> Callable[..., Iterator[Subject]]:
    def subjects(session: Session, device: torch.device, tiny: bool) -> Iterator[Subject]:
        for case in cases.TINY_MOE if tiny else cases.GPU_MOE:
            if case.operator == operator:
                with torch.device(device):
                    yield moe.subject(session, case)

    return subjects


grouped_subjects, permute_subjects = _subjects("grouped_linear"), _subjects("permute")
unpermute_subjects, route_subjects = _subjects("unpermute"), _subjects("route_topk")

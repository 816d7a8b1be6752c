"""Tunable kernels of the normalisations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from m4ov_bench import gate
from m4ov_bench.tunables.problem import Problem, Size, Tunable, blocks, poison, randn, tiles, whole_rows
from m4ov_kernels.norm import reference as norm_reference
from m4ov_kernels.norm import triton as norm

EPS = 1e-6


def _norm(backward: bool) -> Callable[[int, torch.dtype, torch.device, Size], Problem]:
    def problem(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
        rows = max(2, size.elements // width)
        x, added, grad, grad_total = (randn((rows, width), dtype, device) for _ in range(4))
        weight = randn((width,), dtype, device)

        def definition(hidden: Tensor, scale: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            normed, total = norm_reference.rms_norm(hidden, scale, EPS, residual, "hf")[:2]
            return normed, total

        inputs = (x.requires_grad_(backward), weight.requires_grad_(backward), added)
        grads = (grad, grad_total)

        def judged(*, double: bool) -> list[Tensor]:
            tensors = [t.double() if double else t for t in inputs]
            if not backward:
                return list(definition(*tensors))
            return gate.differentiated(definition, tensors, [g.double() if double else g for g in grads])[2:]

        plain, exact = judged(double=False), judged(double=True)
        x, weight = x.detach(), weight.detach()
        forward_out = (torch.empty_like(x), torch.empty_like(x), torch.empty(rows, device=device))
        norm.rms_norm_fwd(x, weight, added, EPS, "hf", out=forward_out)
        _, total, rstd = forward_out
        out = (torch.empty_like(x), torch.empty_like(weight))

        def run() -> None:
            if backward:
                norm.rms_norm_bwd(grad, grad_total, total, weight, rstd, "hf", True, out=out)
            else:
                norm.rms_norm_fwd(x, weight, added, EPS, "hf", out=forward_out)

        made = out if backward else forward_out
        names = ("grad_hidden_states", "grad_weight") if backward else ("normed", "sum")
        return Problem(lambda: poison(made), run, lambda: made[:2], names, plain, exact)

    return problem


def _layer_norm(backward: bool) -> Callable[[int, torch.dtype, torch.device, Size], Problem]:
    def problem(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
        rows = max(2, size.elements // width)
        x, added, grad, grad_total = (randn((rows, width), dtype, device) for _ in range(4))
        weight, bias = (randn((width,), dtype, device) for _ in range(2))

        def definition(hidden: Tensor, scale: Tensor, shift: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            return norm_reference.layer_norm(hidden, scale, shift, residual, EPS, "hf")

        def judged(*, double: bool) -> list[Tensor]:
            inputs, grads = ([t.double() if double else t for t in all_] for all_ in (tensors, (grad, grad_total)))
            if not backward:
                return list(definition(*inputs))
            leaves = [t.detach().requires_grad_() for t in inputs]
            return gate.differentiated(definition, leaves, grads)[2:5]

        tensors = (x, weight, bias, added)
        plain, exact = judged(double=False), judged(double=True)
        statistics = [torch.empty(rows, device=device) for _ in range(2)]
        forward_out = (torch.empty_like(x), torch.empty_like(x), *statistics)
        norm.layer_norm_fwd(*tensors, EPS, "hf", out=forward_out)
        _, total, mean, rstd = forward_out
        out = (torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias))

        def run() -> None:
            if backward:
                norm.layer_norm_bwd(grad, grad_total, total, weight, mean, rstd, True, True, out=out)
            else:
                norm.layer_norm_fwd(*tensors, EPS, "hf", out=forward_out)

        made = out if backward else forward_out
        names = ("grad_hidden_states", "grad_weight", "grad_bias") if backward else ("normed", "sum")
        return Problem(lambda: poison(made), run, lambda: made[: len(names)], names, plain, exact)

    return problem


TUNABLES = (
    Tunable("layer_norm_fwd", whole_rows, _layer_norm(False)),
    Tunable("layer_norm_bwd", whole_rows, _layer_norm(True)),
    Tunable("layer_norm_fwd_wide", blocks("BLOCK_D", 4096, 2048, 8192, 1024), _layer_norm(False)),
    Tunable("layer_norm_bwd_wide", blocks("BLOCK_D", 4096, 2048, 8192, 1024), _layer_norm(True)),
    Tunable(
        "layer_norm_bwd_parameters",
        tiles("BLOCK_ROWS", "BLOCK_D", (4, 1024), (8, 512), (4, 512), (2, 1024), (8, 1024)),
        _layer_norm(True),
    ),
    Tunable("rms_norm_fwd", whole_rows, _norm(False)),
    Tunable("rms_norm_bwd", whole_rows, _norm(True)),
    Tunable("rms_norm_fwd_wide", blocks("BLOCK_D", 4096, 2048, 8192, 1024), _norm(False)),
    Tunable("rms_norm_bwd_wide", blocks("BLOCK_D", 4096, 2048, 8192, 1024), _norm(True)),
    Tunable(
        "rms_norm_bwd_weight",
        tiles("BLOCK_ROWS", "BLOCK_D", (4, 1024), (8, 512), (4, 512), (2, 1024), (8, 1024)),
        _norm(True),
    ),
    Tunable(
        "rms_norm_bwd_reduce",
        tiles("BLOCK_PARTIALS", "BLOCK_D", (16, 128), (32, 64), (32, 128), (8, 128), (16, 64)),
        _norm(True),
    ),
)

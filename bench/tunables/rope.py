"""Tunable kernels of the rotary embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from m4ov_bench import gate
from m4ov_bench.tunables.problem import Problem, Size, Tunable, poison, randn, warp_counts
from m4ov_kernels.gpu import Config
from m4ov_kernels.rope import reference as rope_reference
from m4ov_kernels.rope import triton as rope
from m4ov_kernels.vision import reference as vision_reference
from m4ov_kernels.vision import triton as vision

EPS, THETA = 1e-6, 5e6
_HEADS, _KV_HEADS = 16, 8


def head_tiles(width: int | None) -> Iterator[Config]:
    assert width is not None
    for heads in (8, 16, 4, 2, 1):
        for warps in warp_counts(heads * width):
            yield Config({"BLOCK_HEADS": heads, "BLOCK_HALF": width // 2}, warps)


def patch_tiles(width: int | None) -> Iterator[Config]:
    for config in head_tiles(width):
        yield Config({**config.constexprs, "BLOCK_IMAGES": 64}, config.num_warps)


def _mrope(backward: bool) -> Callable[[int, torch.dtype, torch.device, Size], Problem]:
    def problem(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
        tokens = max(2, size.elements // (width * (_HEADS + _KV_HEADS)))
        inputs = [randn((tokens, heads, width), dtype, device) for heads in (_HEADS, _KV_HEADS)]
        grads = [torch.randn_like(x) for x in inputs]
        inputs += [randn((width,), dtype, device) for _ in range(2)]
        positions = torch.randint(0, 40_000, (3, tokens), device=device)
        half = width // 2
        options = ([half - 2 * (half // 3), half // 3, half // 3], THETA, EPS, True, width, "hf")

        def definition(*tensors: Tensor) -> tuple[Tensor, ...]:
            return rope_reference.qk_norm_mrope(*tensors, positions, *options)

        def run() -> None:
            if backward:
                rope.qk_norm_mrope_bwd(*grads, *inputs, positions, *options, True, True, out=out)
            else:
                rope.qk_norm_mrope_fwd(*inputs, positions, *options, out=out)

        names = ("grad_q", "grad_k", "grad_q_weight", "grad_k_weight") if backward else ("q_turned", "k_turned")
        out = tuple(torch.empty_like(x) for x in (inputs if backward else inputs[:2]))
        return _problem(definition, inputs, grads, backward, run, out, names)

    return problem


def _vision(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
    side = max(1, int((size.elements // (2 * _HEADS * width)) ** 0.5) // 2)
    grid = torch.tensor([[1, 2 * side, 2 * side]], device=device)
    inputs = [randn((4 * side * side, _HEADS, width), dtype, device) for _ in range(2)]
    out = tuple(torch.empty_like(x) for x in inputs)

    def definition(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return vision_reference.vision_rope(q, k, grid, None, 2, 1e4, "hf")

    def run() -> None:
        vision.vision_rope_fwd(*inputs, grid, None, 2, 1e4, "hf", out=out)

    return _problem(definition, inputs, [], False, run, out, ("q_turned", "k_turned"))


def _problem(
    definition: Callable[..., tuple[Tensor, ...]],
    inputs: list[Tensor],
    grads: list[Tensor],
    backward: bool,
    run: Callable[[], None],
    out: tuple[Tensor, ...],
    names: tuple[str, ...],
) -> Problem:
    def judged(*, double: bool) -> list[Tensor]:
        tensors = [x.double() if double else x for x in inputs]
        if not backward:
            return list(definition(*tensors))
        leaves = [x.detach().requires_grad_() for x in tensors]
        return gate.differentiated(definition, leaves, [g.double() if double else g for g in grads])[2:]

    plain, exact = judged(double=False), judged(double=True)
    return Problem(lambda: poison(out), run, lambda: out, names, plain, exact)


TUNABLES = (
    Tunable("qk_norm_mrope_fwd", head_tiles, _mrope(False)),
    Tunable("qk_norm_mrope_bwd", head_tiles, _mrope(True)),
    Tunable("vision_rope", patch_tiles, _vision),
)

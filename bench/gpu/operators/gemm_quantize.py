"""The quantisations of activations for the GPU suite: what they made, and their definitions, codes times scales."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from m4ov_bench import cases, gemm_quantize
from m4ov_bench.gpu.example import Example, Maker
from m4ov_bench.session import Session, Subject
from m4ov_kernels import quantize_fp8, quantize_int8, rms_norm, rms_norm_quantize, swiglu, swiglu_quantize
from m4ov_kernels.gemm import reference
from m4ov_kernels.gemm.reference_quantize import BLOCK

EPS = 1e-6
_SHAPES = (
    ((37, 4096), "contiguous", 1.0),
    ((3, 5, 1152), "wide rows", 30.0),
    ((4, 16, 128), "transposed", 1.0),
    ((1025, 130), "offset", 2000.0),
    ((9, 4304), "every other", 1e-4),
    ((7,), "contiguous", 1.0),
    ((0, 64), "contiguous", 1.0),
    ((130, 16387), "contiguous", 1.0),
)
_TINY_SHAPES = (((5, 32), "contiguous", 1.0), ((2, 3, 33), "wide rows", 30.0), ((0, 16), "contiguous", 1.0))


def _values(made: tuple[Tensor, ...], granularity: str = "row") -> tuple[Tensor, ...]:
    """Codes times scales, the scales, and what else there is (of values transposed, as numbers)."""
    codes, scales, *rest = made
    width, wide = codes.shape[-1], codes.to(torch.float32)
    spread = scales
    if granularity == "group":
        spread = scales.repeat_interleave(BLOCK, -1)[..., :width]
    elif granularity == "block":
        wide = wide.reshape(-1, width)
        spread = scales.repeat_interleave(BLOCK, 0)[: wide.shape[0]].repeat_interleave(BLOCK, 1)[:, :width]
    return wide * spread, scales, *(x.to(torch.float32) if x.element_size() == 1 else x for x in rest if x.numel())


def _shapes(tiny: bool) -> tuple[tuple[tuple[int, ...], str, float], ...]:
    return _TINY_SHAPES if tiny else _SHAPES


def _title(shape: tuple[int, ...], layout: str, magnitude: float, *more: str) -> str:
    return ", ".join((f"{list(shape)}", layout, f"× {magnitude:g}", *more))


def int8_examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    for shape, layout, magnitude in _shapes(tiny):
        yield Example(
            _title(shape, layout, magnitude),
            lambda x: _values(quantize_int8(x)),
            lambda x: _values(reference.quantize_int8(x)),
            (maker.normal(shape, layout, magnitude, grad=False),),
            (),
            ("values", "scales"),
        )


def fp8_examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    for shape, layout, magnitude in _shapes(tiny):
        for granularity, transposed in (("row", False), ("group", False), ("block", False), ("block", True)):
            yield Example(
                _title(shape, layout, magnitude, granularity, *["transposed"] * transposed),
                partial(_fp8, quantize_fp8, granularity, transposed),
                partial(_fp8, reference.quantize_fp8, granularity, transposed),
                (maker.normal(shape, layout, magnitude, grad=False),),
                (),
                ("values", "scales", "transposed")[: 2 + (transposed and 0 not in shape)],
            )


def _fp8(function: Callable[..., Any], granularity: str, transposed: bool, x: Tensor) -> tuple[Tensor, ...]:
    return _values(function(x, granularity, transposed), granularity)


def norm_examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    for shape, layout, magnitude in _shapes(tiny):
        for dtype, residual in (("int8", False), ("fp8", True)):
            hidden = [maker.normal(shape, layout, magnitude, grad=False) for _ in range(1 + residual)]
            weight = maker.normal(shape[-1:], "contiguous", grad=False)
            numerics = random.choice(("hf", "vllm", "fp32"))
            options = {"dtype": dtype, "numerics": numerics}
            yield Example(
                _title(shape, layout, magnitude, dtype, numerics, *["residual"] * residual),
                partial(_norm_ours, options),
                partial(_norm_defined, options),
                (hidden[0], weight, *hidden[1:]),
                (),
                ("values", "scales", "sum")[: 2 + (residual and 0 not in shape)],
                plain=partial(_norm_composed, options),
            )


def _norm_ours(
    options: dict[str, str], x: Tensor, weight: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, ...]:
    return _values(rms_norm_quantize(x, weight, eps=EPS, residual=residual, **options))


def _norm_defined(
    options: dict[str, str], x: Tensor, weight: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, ...]:
    made = reference.rms_norm_quantize(x, weight, residual, EPS, options["numerics"], options["dtype"])
    return _values(made[: 2 if residual is None else 3])


def _norm_composed(
    options: dict[str, str], x: Tensor, weight: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, ...]:
    """By our own kernels: the same bits, and so the same error, are what is promised."""
    made: Any = rms_norm(x, weight, eps=EPS, residual=residual, numerics=options["numerics"])  # type: ignore[call-overload]
    normed, *rest = made if residual is not None else (made,)
    return _values((*_quantized(normed, options["dtype"]), *rest))


def _quantized(x: Tensor, dtype: str) -> tuple[Tensor, ...]:
    return quantize_int8(x) if dtype == "int8" else quantize_fp8(x)


def swiglu_examples(maker: Maker, tiny: bool) -> Iterator[Example]:
    for shape, layout, magnitude in _shapes(tiny):
        for dtype in ("int8", "fp8"):
            options = {"dtype": dtype, "numerics": random.choice(("hf", "fp32"))}
            yield Example(
                _title(shape, layout, magnitude, *options.values()),
                partial(_swiglu_ours, options),
                partial(_swiglu_defined, options),
                tuple(maker.normal(shape, layout, magnitude, grad=False) for _ in range(2)),
                (),
                ("values", "scales"),
                plain=partial(_swiglu_composed, options),
            )


def _swiglu_ours(options: dict[str, str], gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    return _values(swiglu_quantize(gate, up, **options))


def _swiglu_defined(options: dict[str, str], gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    return _values(reference.swiglu_quantize(gate, up, options["numerics"], options["dtype"]))


def _swiglu_composed(options: dict[str, str], gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    return _values(_quantized(swiglu(gate, up, numerics=options["numerics"]), options["dtype"]))


def _subjects(operator: str, session: Session, device: torch.device, tiny: bool) -> Iterator[Subject]:
    for case in cases.TINY_QUANTIZE if tiny else cases.GPU_QUANTIZE:
        if case.operator == operator:
            with torch.device(device):
                yield gemm_quantize.subject(case, case.compiled)


int8_subjects = partial(_subjects, "quantize_int8")
fp8_subjects = partial(_subjects, "quantize_fp8")
norm_subjects = partial(_subjects, "rms_norm_quantize")
swiglu_subjects = partial(_subjects, "swiglu_quantize")

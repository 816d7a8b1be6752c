"""Cases of the quantisations of activations: their definitions are met to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import m4ov_kernels
from m4ov_kernels import quantize_fp8, quantize_int8, rms_norm, rms_norm_quantize, swiglu, swiglu_quantize
from m4ov_kernels.dispatch import KERNEL_DTYPES
from m4ov_kernels.gemm.quantize import GRANULARITIES, scale_shape

from .. import draws
from ..draws import Draw
from . import corruptions
from .case import Call, OperatorCase
from .options import NUMERICS, nonnegative, tensor_dtype

CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
DTYPE = corruptions.value("dtype", ValueError, "unknown", "INT8", "", "fp16", None, 8, b"int8", ["int8"])
GRANULARITY = corruptions.value("granularity", ValueError, "unknown", "Row", "", "tensor", None, 0, b"row", ["row"])


def same_bits(name: str, got: Tensor, expected: Tensor) -> None:
    """NaN is NaN, and -0 is not 0."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), name
    numbers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    nan = torch.tensor(False) if got.element_size() == 1 else got.isnan() & expected.isnan()
    differ = (got.contiguous().view(numbers) != expected.contiguous().view(numbers)) & ~nan
    if differ.any():
        first = tuple(differ.nonzero()[0].tolist())
        values = f"{got[first].item()!r} and {expected[first].item()!r}"
        raise AssertionError(f"{name}: {int(differ.sum())} of {got.numel()} differ, first {first}: {values}")


@dataclass(frozen=True)
class ExactCase(OperatorCase):
    """``composed``: what the call must equal, to the bit, by the implementations that serve it; ``served``: the
    arguments whose dtype says which kernels do. Judged by the reference where there is nothing to compose."""

    composed: Callable[..., Any] | None = None
    served: tuple[str, ...] = field(default=())

    def __repr__(self) -> str:
        return self.name

    def kernel_dtype(self, arguments: Mapping[str, Any]) -> torch.dtype | None:
        dtypes = {arguments[name].dtype for name in self.served if arguments.get(name) is not None}
        return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(KERNEL_DTYPES) else None

    def judge(self, call: Call, got: Mapping[str, Tensor]) -> None:
        if self.composed is not None:
            expected = self.evaluate(call, None, self.composed)
        else:
            with m4ov_kernels.backend("reference"):
                expected = self.evaluate(call)
        for name, tensor in got.items():
            same_bits(name, tensor, expected[name])


def _near_ties(draw: Draw, x: Tensor) -> Tensor:
    """Now and then, rows whose quotients stand halfway between two codes, or next to it."""
    if x.numel() == 0 or not draw.one_in(4):
        return x
    steps = draw.choice((254.0, 896.0, 120.0))  # halves of int8's codes, and what e4m3's ends with
    x = (x.float().clamp(-1, 1) * steps).round() / steps
    x[..., :1] = draw.choice((1.0, -1.0, 0.99609375))
    return x * draw.choice((1.0, 1.75, 1.2345679, 0.8930664, 2.0**-100, 1e-38, 3e38))


def _tensor(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> Tensor:
    x = draws.tensor(draw, shape, dtype, kind)
    tied = _near_ties(draw, x)
    return x if tied is x else tied.to(dtype)


def _int8_arguments(draw: Draw) -> dict[str, Any]:
    shape, dtype, kind = draws.shape(draw), tensor_dtype(draw), draws.kinds(draw)
    return {"input": _tensor(draw, shape, dtype, kind())}


def _fp8_arguments(draw: Draw) -> dict[str, Any]:
    granularity = draw.choice(GRANULARITIES)
    return _int8_arguments(draw) | {
        "granularity": granularity,
        "transposed": granularity == "block" and draw.boolean(),
    }


def _fp8_results(input: Tensor, granularity: str, transposed: bool) -> Any:
    made = {
        "values": (input.shape, CODES["fp8"]),
        "scales": (scale_shape(input.shape, granularity), torch.float32),
    }
    turned = (input.shape[-1], input.shape[:-1].numel())
    return made | {"transposed": (turned, CODES["fp8"])} if transposed else made


def _row_results(shape: torch.Size, dtype: str) -> dict[str, Any]:
    return {"codes": (shape, CODES[dtype]), "scales": ((*shape[:-1], 1), torch.float32)}


def _norm_arguments(draw: Draw) -> dict[str, Any]:
    shape, dtype = draws.shape(draw), tensor_dtype(draw)
    kind = draws.kinds(draw)
    return {
        "hidden_states": draws.tensor(draw, shape, dtype, kind()),
        "weight": draws.tensor(draw, shape[-1:], torch.float32 if draw.one_in(64) else dtype, kind()),
        "residual": draws.tensor(draw, shape, dtype, kind()) if draw.boolean() else None,
        "eps": draw.choice((1e-6, 1e-5, 1.0, 0, 1e-38)),
        "dtype": draw.choice(("int8", "fp8")),
        "numerics": draw.choice(draws.NUMERICS),
    }


def _norm_results(hidden_states: Tensor, residual: Tensor | None, dtype: str, **_: Any) -> Any:
    made = _row_results(hidden_states.shape, dtype)
    return made if residual is None else made | {"total": (hidden_states.shape, hidden_states.dtype)}


def _quantized(x: Tensor, dtype: str) -> tuple[Tensor, ...]:
    return quantize_int8(x) if dtype == "int8" else quantize_fp8(x)


def norm_then_quantize(*, dtype: str, residual: Tensor | None, **arguments: Any) -> tuple[Tensor, ...]:
    normed = rms_norm(**arguments, residual=residual)
    if isinstance(normed, Tensor):
        return _quantized(normed, dtype)
    return *_quantized(normed[0], dtype), normed[1]


def _swiglu_arguments(draw: Draw) -> dict[str, Any]:
    shape, dtype, kind = draws.shape(draw), tensor_dtype(draw), draws.kinds(draw)
    if draw.one_in(4):  # the two halves of one projection
        gate, up = draws.tensor(draw, (*shape[:-1], 2 * shape[-1]), dtype, kind()).chunk(2, dim=-1)
    else:
        gate, up = (draws.tensor(draw, shape, dtype, kind()) for _ in range(2))
    options = {"dtype": draw.choice(("int8", "fp8")), "numerics": draw.choice(draws.NUMERICS)}
    return {"gate": gate, "up": up, **options}


def swiglu_then_quantize(*, dtype: str, **arguments: Any) -> tuple[Tensor, ...]:
    return _quantized(swiglu(**arguments), dtype)


def _input(argument: str) -> tuple[corruptions.Corruption, ...]:
    empty = corruptions.shape(argument, corruptions.scalar, lambda size: (*size[:-1], 0))
    return *corruptions.float_tensor(argument), empty


def _turned(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str]:
    return {"granularity": draw.choice(("row", "group")), "transposed": True}, "True"


def _other(argument: str) -> tuple[corruptions.Corruption, ...]:
    return (
        *corruptions.float_tensor(argument, optional=argument == "residual"),
        corruptions.float_dtype(argument),
        corruptions.shape(argument, corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.device(argument),
    )


QUANTIZE_INT8 = ExactCase(
    "quantize_int8",
    quantize_int8,
    _int8_arguments,
    lambda input: _row_results(input.shape, "int8"),
    (),
    _input("input"),
    served=("input",),
)
QUANTIZE_FP8 = ExactCase(
    "quantize_fp8",
    quantize_fp8,
    _fp8_arguments,
    _fp8_results,
    (),
    (
        *_input("input"),
        GRANULARITY,
        corruptions.value("transposed", TypeError, "not a bool", 1, None, "yes"),
        corruptions.Corruption("transposed", "of rows", ValueError, _turned),
    ),
    served=("input",),
)
RMS_NORM_QUANTIZE = ExactCase(
    "rms_norm_quantize",
    rms_norm_quantize,
    _norm_arguments,
    _norm_results,
    (),
    (
        *_input("hidden_states"),
        *corruptions.float_tensor("weight"),
        corruptions.shape("weight", corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.device("weight"),
        *_other("residual"),
        *nonnegative("eps"),
        DTYPE,
        NUMERICS,
    ),
    composed=norm_then_quantize,
    served=("hidden_states", "weight"),
)
SWIGLU_QUANTIZE = ExactCase(
    "swiglu_quantize",
    swiglu_quantize,
    _swiglu_arguments,
    lambda gate, dtype, **_: _row_results(gate.shape, dtype),
    (),
    (*_input("gate"), *_other("up"), DTYPE, NUMERICS),
    composed=swiglu_then_quantize,
    served=("gate",),
)

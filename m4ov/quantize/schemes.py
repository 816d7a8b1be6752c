"""The schemes: what a weight becomes, what its input becomes, and which format holds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight

Weight = Int4Weight | Int8Weight | Fp8Weight
GROUP_SIZES = (128, 64, 32)
WHOLE_ROW = -1


@dataclass(frozen=True)
class Scheme:
    """One way to quantise.

    Attributes:
        name: as the command line has it.
        summary: in words.
        format: a key of ``m4ov_kernels.gemm.weights.FORMATS``.
        pack: float32 [N, K], group size, dtype of 16 bits → the weight.
        grid: for each row of a float32 input [R, K], what the product sees of it.
        gate: N and K that engines' kernels want multiples of; others need a slower kernel or are refused there.
    """

    name: str
    summary: str
    format: str
    pack: Callable[[Tensor, int, torch.dtype], Weight]
    grid: Callable[[Tensor], Tensor]
    gate: tuple[int, int]

    def group_size(self, in_features: int, wanted: int) -> int | None:
        """The group size of a linear: as wanted, or the next smaller one of which K is a multiple (the format has whole
        groups alone); ``None``: there is none. Schemes without groups: −1."""
        if self.name != "w4" or wanted == WHOLE_ROW:
            return WHOLE_ROW
        return next((size for size in GROUP_SIZES if size <= wanted and in_features % size == 0), None)

    def output(self, input: Tensor, weight: Tensor) -> Tensor:
        """float32 ``x̂·Ŵᵀ``, [R, N], of an input [R, K] and a dequantised weight [N, K]."""
        return self.grid(input) @ weight.t()


def _int4(weight: Tensor, group_size: int, dtype: torch.dtype) -> Weight:
    return Int4Weight.quantize(weight, group_size=group_size, scale_dtype=dtype)


def _int8(weight: Tensor, group_size: int, dtype: torch.dtype) -> Weight:
    return Int8Weight.quantize(weight, scale_dtype=torch.float32)


def _fp8(granularity: str) -> Callable[[Tensor, int, torch.dtype], Weight]:
    return lambda weight, group_size, dtype: Fp8Weight.quantize(weight, granularity=granularity)


def _as_it_is(input: Tensor) -> Tensor:
    return input


def _int8_rows(input: Tensor) -> Tensor:
    scale = (input.abs().amax(-1, keepdim=True) / 127).clamp_min(2.0**-126)
    return (input / scale).round() * scale


def _fp8_groups(input: Tensor) -> Tensor:
    K = input.shape[-1]
    padded = torch.nn.functional.pad(input, (0, -K % 128)).unflatten(-1, (-1, 128))
    return _fp8_rows(padded).flatten(-2)[..., :K]


def _fp8_rows(input: Tensor) -> Tensor:
    scale = (input.abs().amax(-1, keepdim=True) / 448).clamp_min(2.0**-126)
    return (input / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "w4",
            "four-bit integers, symmetric, a scale for each group of inputs; 16-bit activations",
            "compressed-tensors-int4",
            _int4,
            _as_it_is,
            (64, 128),
        ),
        Scheme(
            "w8a8",
            "eight-bit integers, a scale for each output; activations to eight bits token by token",
            "compressed-tensors-int8",
            _int8,
            _int8_rows,
            (16, 16),
        ),
        Scheme(
            "fp8-row",
            "e4m3, a scale for each output; activations to e4m3 token by token",
            "compressed-tensors-fp8",
            _fp8("channel"),
            _fp8_rows,
            (16, 16),
        ),
        Scheme(
            "fp8-block",
            "e4m3, a scale for each 128x128 block; activations to e4m3 for each 128 inputs of a token",
            "block-fp8",
            _fp8("block"),
            _fp8_groups,
            (64, 128),
        ),
    )
}

"""``Int8Weight``: eight-bit codes with one scale for each output channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from m4ov_kernels.checks import describe, refuse
from m4ov_kernels.gemm.weights import bits, validate
from m4ov_kernels.gemm.weights.cached import Cached

_NAME = "Int8Weight"


@dataclass(frozen=True, eq=False, repr=False)
class Int8Weight(Cached):
    """W[n, k] = q[n, k]·s[n].

    Attributes:
        codes: int8 [N, K], −128..127; N, K ≥ 1.
        scales: float32, bfloat16 or float16 [N, 1], finite.
    """

    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.codes, Tensor) or self.codes.dim() != 2 or 0 in self.codes.shape:
            refuse(ValueError, _NAME, "codes", "an int8 tensor [N, K] with N and K at least 1", describe(self.codes))
        validate.tensor_of(_NAME, "codes", self.codes, (torch.int8,), tuple(self.codes.shape))
        validate.tensor_of(_NAME, "scales", self.scales, validate.SCALE_DTYPES, (self.codes.shape[0], 1))
        validate.finite(_NAME, "scales", self.scales)
        validate.one_device(_NAME, {"codes": self.codes, "scales": self.scales})

    @property
    def shape(self) -> torch.Size:
        """[N, K] = [out_features, in_features]."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[N, K] in `dtype` (default: the scales'). q·s is rounded once: it is exact in float64, and in float32 when
        the scales are 16 bits wide."""
        dtype = validate.output_dtype(_NAME, dtype, self.scales.dtype)
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        return (self.codes.to(wide) * self.scales.to(wide)).to(dtype)

    def equal(self, other: object) -> bool:
        """The same weight, bit for bit."""
        return (
            isinstance(other, Int8Weight)
            and bits.same(self.codes, other.codes)
            and bits.same(self.scales, other.scales)
        )

    def to(self, device: torch.device | str) -> Int8Weight:
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))

    def rows(self, begin: int, end: int) -> Int8Weight:
        """Output features ``begin`` to ``end``, at least one of them; the tensors are views."""
        return replace(self, codes=self.codes[begin:end], scales=self.scales[begin:end])

    @classmethod
    def quantize(cls, weight: Tensor, *, scale_dtype: torch.dtype | None = None) -> Int8Weight:
        """Round to nearest, half to even, in float32 whatever the weight's dtype; compressed-tensors' min-max rule:
        s = max|w|/127.5 over the row, rounded to `scale_dtype` (default: the weight's own if 16 bits wide, else
        float32), q = clamp(rne(w/s), −128, 127). A row of zeros gets s = 1; no other scale rounds to 0.

        Args:
            weight: float [N, K]; NaN, infinities and magnitudes past 7/8 of float32's range are refused.

        Raises:
            ValueError: also if `scale_dtype` cannot hold a scale.
        """
        wide = validate.matrix(_NAME, weight)
        dtype = validate.scale_dtype_of(_NAME, weight, scale_dtype)
        scales = validate.rounded_scales(_NAME, wide.abs().amax(1, keepdim=True) / 127.5, dtype)
        return cls((wide / scales.float()).round().clamp(-128, 127).to(torch.int8), scales)

    def state_dict(self) -> dict[str, Tensor]:
        """Canonical and exact, by compressed-tensors' names."""
        return {"weight": self.codes, "weight_scale": self.scales}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Int8Weight:
        """The inverse of ``state_dict``, bit for bit; anything else is refused."""
        validate.keys_of(_NAME, state, ("weight", "weight_scale"), ())
        return cls(state["weight"], state["weight_scale"])

"""``Fp8Weight``: float8_e4m3fn values with a scale for the tensor, for each output channel, or for 128×128 blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from m4ov_kernels.checks import describe, refuse
from m4ov_kernels.gemm.weights import bits, validate
from m4ov_kernels.gemm.weights.cached import Cached

BLOCK = 128
LARGEST = 448.0  # of float8_e4m3fn, which has no infinity
GRANULARITIES = ("tensor", "channel", "block")
_NAME = "Fp8Weight"


def scale_shape(shape: tuple[int, ...], granularity: str) -> tuple[int, int]:
    N, K = shape
    shapes = {"tensor": (1, 1), "channel": (N, 1), "block": (-(-N // BLOCK), -(-K // BLOCK))}
    return shapes[granularity]


@dataclass(frozen=True, eq=False, repr=False)
class Fp8Weight(Cached):
    """W[n, k] = v[n, k]·s, s the scale of the tensor, of the channel n, or of the block (n // 128, k // 128).

    Attributes:
        values: float8_e4m3fn [N, K] without NaN; N, K ≥ 1.
        scales: float32, bfloat16 or float16, finite: [1, 1], [N, 1] or [⌈N/128⌉, ⌈K/128⌉] (blocks at the edges are
            short; nothing is padded).
        granularity: "tensor", "channel" or "block".
        input_scale: float32, bfloat16 or float16 [1], the scale of a static activation quantisation
            (x ≈ x₈·input_scale), or ``None``: activations are quantised as they come, or not at all.
    """

    values: Tensor
    scales: Tensor
    granularity: str
    input_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            refuse(ValueError, _NAME, "granularity", "one of " + ", ".join(map(repr, GRANULARITIES)), self.granularity)
        v = self.values
        if not isinstance(v, Tensor) or v.dim() != 2 or 0 in v.shape:
            refuse(ValueError, _NAME, "values", "float8_e4m3fn [N, K] with N and K at least 1", describe(v))
        validate.tensor_of(_NAME, "values", v, (torch.float8_e4m3fn,), tuple(v.shape))
        if v.device.type == "cpu" and bool(((v.view(torch.uint8) & 0x7F) == 0x7F).any()):
            refuse(ValueError, _NAME, "values", "free of NaN", "NaN")
        shape = scale_shape(tuple(v.shape), self.granularity)
        validate.tensor_of(_NAME, "scales", self.scales, validate.SCALE_DTYPES, shape)
        validate.finite(_NAME, "scales", self.scales)
        if self.input_scale is not None:
            validate.tensor_of(_NAME, "input_scale", self.input_scale, validate.SCALE_DTYPES, (1,))
            validate.finite(_NAME, "input_scale", self.input_scale)
        validate.one_device(_NAME, self._tensors())

    def _tensors(self) -> dict[str, Tensor | None]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "granularity"}

    @property
    def shape(self) -> torch.Size:
        """[N, K] = [out_features, in_features]."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values() if tensor is not None)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[N, K] in `dtype` (default: the scales'). v·s is rounded once: it is exact in float64, and in float32 when
        the scales are 16 bits wide."""
        dtype = validate.output_dtype(_NAME, dtype, self.scales.dtype)
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        return (self.values.to(wide) * _spread(self.scales.to(wide), self.shape, self.granularity)).to(dtype)

    def equal(self, other: object) -> bool:
        """The same weight, bit for bit."""
        if not isinstance(other, Fp8Weight) or self.granularity != other.granularity:
            return False
        theirs = other._tensors()
        return all(bits.same(tensor, theirs[name]) for name, tensor in self._tensors().items())

    def to(self, device: torch.device | str) -> Fp8Weight:
        moved: dict[str, Any] = {k: v if v is None else v.to(device) for k, v in self._tensors().items()}
        return replace(self, **moved)

    def rows(self, begin: int, end: int) -> Fp8Weight:
        """Output features ``begin`` to ``end``, at least one of them; the tensors are views. Of blocks: whole ones."""
        scales = self.scales
        if self.granularity == "block":
            if begin % BLOCK:
                refuse(ValueError, _NAME, "begin", f"a multiple of {BLOCK}", begin)
            scales = scales[begin // BLOCK : -(-min(end, self.shape[0]) // BLOCK)]
        elif self.granularity == "channel":
            scales = scales[begin:end]
        return replace(self, values=self.values[begin:end], scales=scales)

    def repeated(self, granularity: str) -> Fp8Weight:
        """The same weight, value for value, with the tensor's one scale written out for each channel or block."""
        if self.granularity == granularity:
            return self
        if self.granularity != "tensor" or granularity not in GRANULARITIES:
            expected = f"'{self.granularity}'" + (", 'channel' or 'block'" if self.granularity == "tensor" else "")
            refuse(ValueError, _NAME, "granularity", expected, repr(granularity))
        scales = self.scales.expand(scale_shape(tuple(self.shape), granularity)).contiguous()
        return replace(self, scales=scales, granularity=granularity)

    @classmethod
    def quantize(
        cls, weight: Tensor, *, granularity: str = "channel", scale_dtype: torch.dtype = torch.float32
    ) -> Fp8Weight:
        """Round to nearest, half to even, in float32 whatever the weight's dtype: s = max|w|/448 over the tensor, row
        or block, rounded to `scale_dtype`, v = e4m3(clamp(w/s, −448, 448)). Zeros alone get s = 1; no other scale
        rounds to 0.

        Args:
            weight: float [N, K]; NaN, infinities and magnitudes past 7/8 of float32's range are refused.
            granularity: "tensor", "channel" or "block" (128×128).

        Raises:
            ValueError: also if `scale_dtype` cannot hold a scale.
        """
        wide = validate.matrix(_NAME, weight)
        if granularity not in GRANULARITIES:
            refuse(ValueError, _NAME, "granularity", "one of " + ", ".join(map(repr, GRANULARITIES)), granularity)
        dtype = validate.scale_dtype_of(_NAME, weight, scale_dtype)
        scales = validate.rounded_scales(_NAME, _amax(wide.abs(), granularity) / LARGEST, dtype)
        scaled = wide / _spread(scales.float(), wide.shape, granularity)
        return cls(scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scales, granularity)

    def state_dict(self) -> dict[str, Tensor]:
        """Canonical and exact, by compressed-tensors' names; the granularity as its index in ``GRANULARITIES``."""
        state = {
            "weight": self.values,
            "weight_scale": self.scales,
            "granularity": torch.tensor(GRANULARITIES.index(self.granularity), dtype=torch.int64),
        }
        return state if self.input_scale is None else {**state, "input_scale": self.input_scale}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Fp8Weight:
        """The inverse of ``state_dict``, bit for bit; anything else is refused."""
        validate.keys_of(_NAME, state, ("weight", "weight_scale", "granularity"), ("input_scale",))
        validate.tensor_of(_NAME, "state_dict['granularity']", state["granularity"], (torch.int64,), ())
        index = int(state["granularity"])
        if not 0 <= index < len(GRANULARITIES):
            refuse(ValueError, _NAME, "state_dict['granularity']", "0, 1 or 2", index)
        return cls(state["weight"], state["weight_scale"], GRANULARITIES[index], state.get("input_scale"))


def _amax(magnitude: Tensor, granularity: str) -> Tensor:
    if granularity == "tensor":
        return magnitude.amax().reshape(1, 1)
    if granularity == "channel":
        return magnitude.amax(1, keepdim=True)
    N, K = magnitude.shape
    rows, columns = scale_shape((N, K), granularity)
    padded = torch.nn.functional.pad(magnitude, (0, columns * BLOCK - K, 0, rows * BLOCK - N))
    return padded.view(rows, BLOCK, columns, BLOCK).amax((1, 3))


def _spread(scales: Tensor, shape: torch.Size, granularity: str) -> Tensor:
    """The scale of every element, by broadcasting where that does: [1, 1], [N, 1] or [N, K]."""
    if granularity != "block":
        return scales
    rows, columns = (torch.arange(size, device=scales.device) // BLOCK for size in shape)
    return scales[rows][:, columns]

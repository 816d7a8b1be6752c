"""The shapes of quantisation; ``cases.py`` hands them on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from m4ov_kernels.gpu import DTYPES


@dataclass(frozen=True)
class QuantizeCase:
    """Activations to ``codes``, int8 or e4m3, alone or after another operator."""

    rows: int
    width: int
    dtype: torch.dtype = torch.bfloat16
    codes: str = "int8"
    granularity: str = "row"
    transposed: bool = False
    residual: bool = False
    quick: bool = False
    compiled: bool = False
    operator: str = "quantize_int8"

    def __str__(self) -> str:
        kind = self.codes if self.granularity == "row" else f"{self.codes} {self.granularity}s"
        more = " + transposed" * self.transposed + " + residual" * self.residual
        return f"[{self.rows}, {self.width}] {DTYPES[self.dtype]} to {kind}{more}"


@dataclass(frozen=True)
class RequantizeCase:
    """A weight ``[rows, width]`` into panels."""

    rows: int
    width: int
    scheme: str
    group_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    quick: bool = False

    def __str__(self) -> str:
        groups = {-1: ", rows"}.get(self.group_size, f", groups of {self.group_size}") * (self.scheme == "int4")
        return f"[{self.rows}, {self.width}] {DTYPES[self.dtype]} to {self.scheme}{groups}"


_FP8 = {"codes": "fp8", "operator": "quantize_fp8"}
_NORMED, _GATED = {"operator": "rms_norm_quantize"}, {"operator": "swiglu_quantize"}
QUANTIZE = (
    QuantizeCase(4096, 4096, quick=True, compiled=True),
    QuantizeCase(4096, 4096, quick=True, compiled=True, **_FP8),  # type: ignore[arg-type]
    QuantizeCase(4096, 4096, granularity="group", compiled=True, **_FP8),  # type: ignore[arg-type]
    QuantizeCase(4096, 4096, granularity="block", compiled=True, **_FP8),  # type: ignore[arg-type]
    QuantizeCase(4096, 4096, granularity="block", transposed=True, **_FP8),  # type: ignore[arg-type]
    QuantizeCase(4096, 4096, quick=True, compiled=True, **_NORMED),  # type: ignore[arg-type]
    QuantizeCase(4096, 4096, codes="fp8", **_NORMED),  # type: ignore[arg-type]
    QuantizeCase(4096, 4096, residual=True, **_NORMED),  # type: ignore[arg-type]
    QuantizeCase(4096, 4096, quick=True, compiled=True, **_GATED),  # type: ignore[arg-type]
    QuantizeCase(4096, 4096, codes="fp8", **_GATED),  # type: ignore[arg-type]
    QuantizeCase(4096, 4096, torch.float32),
    QuantizeCase(16384, 1152),  # Qwen3-VL's tower
)
REQUANTIZE = (
    RequantizeCase(4096, 4096, "int8", quick=True),
    RequantizeCase(4096, 4096, "int8", dtype=torch.float32),
    RequantizeCase(4096, 4096, "fp8-channel", quick=True),
    RequantizeCase(4096, 4096, "fp8-block"),
    RequantizeCase(4096, 4096, "fp8-tensor"),
    RequantizeCase(4096, 4096, "int4", quick=True),
    RequantizeCase(4096, 4096, "int4", 32),
    RequantizeCase(4096, 4096, "int4", -1),
    RequantizeCase(4096, 12288, "int8"),
    RequantizeCase(12288, 4096, "int4"),
)
GPU_QUANTIZE = (
    QuantizeCase(8192, 4096, compiled=True),
    QuantizeCase(8192, 4096, compiled=True, **_FP8),  # type: ignore[arg-type]
    QuantizeCase(8192, 4096, granularity="group", **_FP8),  # type: ignore[arg-type]
    QuantizeCase(8192, 4096, granularity="block", transposed=True, **_FP8),  # type: ignore[arg-type]
    QuantizeCase(8192, 4096, codes="fp8", **_NORMED),  # type: ignore[arg-type]
    QuantizeCase(8192, 6144, codes="fp8", **_GATED),  # type: ignore[arg-type]
)
TINY_QUANTIZE = (
    QuantizeCase(4, 64, torch.float32),
    QuantizeCase(130, 140, torch.float32, granularity="block", transposed=True, **_FP8),  # type: ignore[arg-type]
    QuantizeCase(4, 64, torch.float32, residual=True, **_NORMED),  # type: ignore[arg-type]
    QuantizeCase(4, 64, torch.float32, **_GATED),  # type: ignore[arg-type]
)
TINY_REQUANTIZE = (RequantizeCase(70, 90, "int4", 32), RequantizeCase(70, 90, "fp8-block"))

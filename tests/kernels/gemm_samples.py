"""Samples of the linears of quantised weights for ``test_dispatch.py``."""

from __future__ import annotations

from typing import Any

import torch

from m4ov_kernels import fp8_linear, int4_linear, int8_linear
from m4ov_kernels.gemm.panels import Panels
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight

MATRIX, GROUPS = torch.randn(72, 40) * 0.1, (torch.randperm(40) // 32).int()
INT4 = Int4Weight.quantize(MATRIX, group_size=32, symmetric=False, g_idx=GROUPS)
INT8 = Int8Weight.quantize(MATRIX)
FP8 = Fp8Weight.quantize(MATRIX, granularity="block")


def int4_case(dtype: torch.dtype = torch.float32) -> Any:
    tensors = [torch.randn(6, 40, dtype=dtype), torch.randn(72, dtype=dtype), torch.randn(6, 36, dtype=dtype)]
    return lambda x, b, r: int4_linear(x, INT4, bias=b, residual=r, epilogue="swiglu"), tensors


def int8_case(dtype: torch.dtype = torch.float32) -> Any:
    tensors = [torch.randn(6, 40, dtype=dtype), torch.randn(72, dtype=dtype)]
    return lambda x, b: int8_linear(x, INT8, bias=b, epilogue="gelu"), tensors


def fp8_case(dtype: torch.dtype = torch.float32) -> Any:
    tensors = [torch.randn(6, 40, dtype=dtype), torch.randn(6, 72, dtype=dtype)]
    return lambda x, r: fp8_linear(x, FP8, residual=r, activation="fp8"), tensors


def _operands(panels: Panels) -> tuple[Any, ...]:
    return panels.codes, panels.scales, panels.zeros, panels.order, panels.input_scale


def _options(panels: Panels, activation: str) -> tuple[Any, ...]:
    return panels.kind, panels.shape[0], panels.group, activation, "none"


X, BIAS, RESIDUAL = torch.randn(6, 40), torch.randn(72), torch.randn(6, 72)
RAW = {
    "quantized_linear_fwd": [
        (X, *_operands(INT4.panels()), BIAS, RESIDUAL, *_options(INT4.panels(), "int8")),
        (X[:2].bfloat16(), *_operands(INT8.panels()), None, None, *_options(INT8.panels(), "int8")),
        (torch.randn(40, 3).t(), *_operands(FP8.panels()), BIAS, None, *_options(FP8.panels(), "bf16")),
    ],
    "quantized_linear_bwd": [
        (RESIDUAL, *_operands(held)[:4], held.kind, 40, held.group)
        for held in (INT4.panels(), INT8.panels(), FP8.panels())
    ],
}

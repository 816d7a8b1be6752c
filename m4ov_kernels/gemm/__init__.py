"""Matrix products: linears of quantised weights, and ``invariant_linear``."""

from m4ov_kernels.gemm.invariant import invariant_linear
from m4ov_kernels.gemm.linear import QUANTIZED_LINEAR, fp8_linear, int4_linear, int8_linear

__all__ = ["QUANTIZED_LINEAR", "fp8_linear", "int4_linear", "int8_linear", "invariant_linear"]

"""Matrix products: linears of quantised weights, quantisation of activations and weights, and ``invariant_linear``."""

from m4ov_kernels.gemm.invariant import invariant_linear
from m4ov_kernels.gemm.linear import QUANTIZED_LINEAR, fp8_linear, int4_linear, int8_linear
from m4ov_kernels.gemm.quantize import quantize_fp8, quantize_int8, rms_norm_quantize, swiglu_quantize
from m4ov_kernels.gemm.requantize import requantize

__all__ = [
    "QUANTIZED_LINEAR",
    "fp8_linear",
    "int4_linear",
    "int8_linear",
    "invariant_linear",
    "quantize_fp8",
    "quantize_int8",
    "requantize",
    "rms_norm_quantize",
    "swiglu_quantize",
]

"""The matrix products through the compiled kernels (CPU; of int4 weights by few rows, GPU too)."""

from m4ov_kernels.gemm.native_backward import quantized_linear_bwd
from m4ov_kernels.gemm.native_invariant import invariant_linear_fwd
from m4ov_kernels.gemm.native_linear import quantized_linear_fwd
from m4ov_kernels.gemm.native_quantize import (
    quantize_fp8_fwd,
    quantize_int8_fwd,
    rms_norm_quantize_fwd,
    swiglu_quantize_fwd,
)

__all__ = [
    "invariant_linear_fwd",
    "quantize_fp8_fwd",
    "quantize_int8_fwd",
    "quantized_linear_bwd",
    "quantized_linear_fwd",
    "rms_norm_quantize_fwd",
    "swiglu_quantize_fwd",
]

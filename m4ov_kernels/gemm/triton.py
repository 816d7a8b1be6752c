"""The GPU kernels of the family, operator by operator; ``KERNELS``: those in CUDA C++ too."""

from m4ov_kernels.gemm import triton_linear, triton_quantize
from m4ov_kernels.gemm.int4_cuda import CUDA_KERNELS
from m4ov_kernels.gemm.triton_linear import quantized_linear_bwd, quantized_linear_fwd
from m4ov_kernels.gemm.triton_quantize import (
    quantize_fp8_fwd,
    quantize_int8_fwd,
    rms_norm_quantize_fwd,
    swiglu_quantize_fwd,
)

__all__ = [
    "KERNELS",
    "quantize_fp8_fwd",
    "quantize_int8_fwd",
    "quantized_linear_bwd",
    "quantized_linear_fwd",
    "rms_norm_quantize_fwd",
    "swiglu_quantize_fwd",
]

KERNELS = [*triton_linear.KERNELS, *triton_quantize.KERNELS, *CUDA_KERNELS]

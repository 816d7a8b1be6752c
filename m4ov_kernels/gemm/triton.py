"""The Triton kernels of the family, operator by operator."""

from m4ov_kernels.gemm.triton_linear import KERNELS as _LINEAR
from m4ov_kernels.gemm.triton_linear import quantized_linear_bwd, quantized_linear_fwd
from m4ov_kernels.gemm.triton_quantize import KERNELS as _QUANTIZE
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

KERNELS = [*_LINEAR, *_QUANTIZE]

"""The GPU kernels of the family, operator by operator; ``KERNELS``: those in CUDA C++ too."""

from m4ov_kernels.gemm import triton_linear
from m4ov_kernels.gemm.int4_cuda import CUDA_KERNELS
from m4ov_kernels.gemm.triton_linear import quantized_linear_bwd, quantized_linear_fwd

__all__ = ["KERNELS", "quantized_linear_bwd", "quantized_linear_fwd"]

KERNELS = [*triton_linear.KERNELS, *CUDA_KERNELS]

"""The Triton kernels of the family, operator by operator."""

from m4ov_kernels.gemm.triton_linear import KERNELS, quantized_linear_bwd, quantized_linear_fwd

__all__ = ["KERNELS", "quantized_linear_bwd", "quantized_linear_fwd"]

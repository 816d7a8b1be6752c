"""The Triton kernels of the family, operator by operator."""

from m4ov_kernels.head.triton_logprob import KERNELS, linear_logprob_bwd, linear_logprob_fwd

__all__ = ["KERNELS", "linear_logprob_bwd", "linear_logprob_fwd"]

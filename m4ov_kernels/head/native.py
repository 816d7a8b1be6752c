"""The compiled kernels of the family, operator by operator."""

from m4ov_kernels.head.native_kl import linear_kl_bwd, linear_kl_fwd
from m4ov_kernels.head.native_logprob import linear_logprob_bwd, linear_logprob_fwd

__all__ = ["linear_kl_bwd", "linear_kl_fwd", "linear_logprob_bwd", "linear_logprob_fwd"]

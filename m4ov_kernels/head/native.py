"""The compiled kernels of the family, operator by operator."""

from m4ov_kernels.head.native_logprob import linear_logprob_bwd, linear_logprob_fwd

__all__ = ["linear_logprob_bwd", "linear_logprob_fwd"]

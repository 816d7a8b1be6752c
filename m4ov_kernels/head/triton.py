"""The Triton kernels of the family, operator by operator."""

from m4ov_kernels.head.triton_kl import KERNELS as _LINEAR_KL
from m4ov_kernels.head.triton_kl import linear_kl_bwd, linear_kl_fwd
from m4ov_kernels.head.triton_logprob import KERNELS as _LINEAR_LOGPROB
from m4ov_kernels.head.triton_logprob import linear_logprob_bwd, linear_logprob_fwd

__all__ = ["KERNELS", "linear_kl_bwd", "linear_kl_fwd", "linear_logprob_bwd", "linear_logprob_fwd"]

KERNELS = [*_LINEAR_LOGPROB, *_LINEAR_KL]

"""What ``m4ov kernels tune`` searches, kernel by kernel: the candidate configurations and a problem to judge them by.

A problem runs the launcher of the family, so that what is measured is what a call runs; where the launcher starts two
kernels, both are in the time, which compares candidates all the same.
"""

from m4ov_bench.tunables import activation, gemm, gemm_quantize, head, head_kl, moe, norm, rope, vision
from m4ov_bench.tunables.problem import GPU, Problem, Size, Tunable

__all__ = ["GPU", "TUNABLES", "Problem", "Size", "Tunable"]

TUNABLES = (
    *activation.TUNABLES,
    *gemm.TUNABLES,
    *gemm_quantize.TUNABLES,
    *head.TUNABLES,
    *head_kl.TUNABLES,
    *moe.TUNABLES,
    *norm.TUNABLES,
    *rope.TUNABLES,
    *vision.TUNABLES,
)

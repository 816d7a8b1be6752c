"""The mixture-of-experts operators in Triton, for CUDA and ROCm (and, interpreted, for CPU tensors). This file hands
their raw functions on, and the table of all their kernels."""

from __future__ import annotations

from m4ov_kernels.moe import triton_grouped, triton_route, triton_rows
from m4ov_kernels.moe.triton_grouped import grouped_linear_bwd, grouped_linear_fwd
from m4ov_kernels.moe.triton_route import route_topk_bwd, route_topk_fwd
from m4ov_kernels.moe.triton_rows import permute_bwd, permute_fwd, unpermute_bwd, unpermute_fwd

__all__ = [
    "KERNELS",
    "grouped_linear_bwd",
    "grouped_linear_fwd",
    "permute_bwd",
    "permute_fwd",
    "route_topk_bwd",
    "route_topk_fwd",
    "unpermute_bwd",
    "unpermute_fwd",
]

KERNELS = [*triton_grouped.KERNELS, *triton_route.KERNELS, *triton_rows.KERNELS]

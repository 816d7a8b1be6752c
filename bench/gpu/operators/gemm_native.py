"""Which cases of the quantised linears the compiled kernels serve on a GPU: under ``backend("native")`` only these are
checked and measured, beside what Triton makes of them."""

from __future__ import annotations

import torch

from m4ov_kernels import dispatch
from m4ov_kernels.gemm.int4_cuda import unserved


def served(device: torch.device, kind: str, rows: int, activation: str, epilogue: str | None) -> bool:
    """Whether the backend that is asked for has a kernel for such a call (without act-order)."""
    if dispatch.requested() != "native" or device.type != "cuda":
        return True
    return unserved(kind, rows, False, activation, epilogue or "none") is None

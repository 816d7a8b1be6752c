"""``quantized_linear`` in Triton, for CUDA and ROCm (and, interpreted, for CPU tensors): canonical weights in.

The forward rounds the activations by one kernel (int8 and fp8), and multiplies by another that dequantises on its way;
few rows split K among programs, and a third adds the parts. The backward makes the weight's values a part at a time,
and multiplies by the vendor's library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m4ov_kernels.gemm import triton_linear_launches as launches
from m4ov_kernels.gemm.triton_linear_builds import KERNELS
from m4ov_kernels.gemm.triton_linear_layout import layout_of
from m4ov_kernels.layout import output

__all__ = ["KERNELS", "quantized_linear_bwd", "quantized_linear_fwd"]


def quantized_linear_fwd(
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: str,
    out_features: int,
    group: int,
    activation: str,
    epilogue: str,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``[M, K]`` → ``[M, N]``, or ``[M, N / 2]`` of gates and ups. ``order``: ``g_idx``; ``group``: input features of a
    scale of int4."""
    features = out_features // 2 if epilogue == "swiglu" else out_features
    result = output(out, (input.shape[0], features), input, input.dtype)
    if result.numel():
        weight = layout_of(codes, scales, zeros, order, kind, input.shape[1], group)
        x = launches.operand(input, weight, input_scale, kind, activation)
        launches.forward(x, weight, bias, residual, result, kind, activation, epilogue)
    return result


def quantized_linear_bwd(
    grad_output: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    kind: str,
    in_features: int,
    group: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``[M, N]`` → ``grad_output @ weight``, ``[M, K]``. A bfloat16 gradient meets a weight rounded to bfloat16, others
    one in float32; sums are float32. Takes, beside, at most 128 MiB of weights."""
    rows, columns = grad_output.shape
    result = output(out, (rows, in_features), grad_output, grad_output.dtype)
    if rows == 0:
        return result
    dtype = torch.bfloat16 if grad_output.dtype is torch.bfloat16 else torch.float32
    grad = grad_output.to(dtype)
    step = min(in_features, launches.features_at_once(columns, dtype.itemsize))
    values = torch.empty(columns, step, dtype=dtype, device=grad.device)
    for first in range(0, in_features, step):
        part = values[:, : min(step, in_features - first)]
        launches.dequantized(codes, scales, zeros, order, kind, group, part, first)
        sink = result[:, first : first + part.shape[1]]
        if result.dtype is dtype:
            torch.mm(grad, part, out=sink)
        else:
            sink.copy_(torch.mm(grad, part))
    return result

"""The definition of the linears of quantised weights, in plain PyTorch: differentiable any number of times, exact in
float64. What activations are rounded to is the same in every dtype: that is computed in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from m4ov_kernels.activation.reference import plain_gelu
from m4ov_kernels.gemm.reference_quantize import quantize_fp8, quantize_int8, rms_norm_quantize, swiglu_quantize
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight
from m4ov_kernels.gemm.weights.fp8 import BLOCK, LARGEST

__all__ = ["quantize_fp8", "quantize_int8", "quantized_linear", "rms_norm_quantize", "rounded", "swiglu_quantize"]


def quantized_linear(
    input: Tensor,
    weight: Int4Weight | Int8Weight | Fp8Weight,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    epilogue: str,
) -> Tensor:
    """See :func:`m4ov_kernels.gemm.int4_linear`; ``activation`` is not "auto", ``epilogue`` not ``None`` but "none"."""
    compute = torch.promote_types(input.dtype, torch.float32)
    wide, single = input.to(compute), input.detach().to(torch.float32)
    scale = weight.pre_quant_scale if isinstance(weight, Int4Weight) else None
    if scale is not None:
        wide, single = wide * scale.to(compute), single * scale.to(torch.float32)
    rows: Tensor = _StraightThrough.apply(wide, rounded(single, weight, activation, compute))
    result = _product(rows, weight.dequantize(compute))
    if bias is not None:
        result = result + bias.to(compute)
    if epilogue == "swiglu":
        gate, up = result.chunk(2, dim=-1)
        result = F.silu(gate) * up
    elif epilogue != "none":
        # The product by one hands GELU's backward (oneDNN's) a gradient of its own: it refuses one whose rows overlap.
        result = plain_gelu(result, "tanh" if epilogue == "gelu_tanh" else "none") * 1.0
    if residual is not None:
        result = result + residual.to(compute)
    return result.to(input.dtype)


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Not in autocast's dtype."""
    if not torch.amp.is_autocast_available(rows.device.type):
        return F.linear(rows, matrix)
    with torch.autocast(rows.device.type, enabled=False):
        return F.linear(rows, matrix)


def rounded(single: Tensor, weight: Any, activation: str, compute: torch.dtype) -> Tensor:
    """The activations float32 [..., K] as they enter the product, in another dtype: bfloat16 values, or codes times
    their scales."""
    if activation == "bf16":
        return single.to(torch.bfloat16).to(compute)
    static = weight.input_scale if activation == "fp8" and isinstance(weight, Fp8Weight) else None
    if activation == "int8":
        codes, scales = quantize_int8(single)
    elif static is not None:
        scales = static.to(torch.float32)
        codes = (single / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    elif isinstance(weight, Fp8Weight) and weight.granularity == "block":
        codes, scales, _ = quantize_fp8(single, "group", False)
        scales = scales.repeat_interleave(BLOCK, -1)[..., : single.shape[-1]]
    else:
        codes, scales, _ = quantize_fp8(single, "row", False)
    return codes.to(compute) * scales.to(compute)


class _StraightThrough(torch.autograd.Function):
    """The second argument, with the gradient of the first."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, replaced: Tensor) -> Tensor:  # type: ignore[override]
        return replaced.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None

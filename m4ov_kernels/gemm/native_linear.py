"""``quantized_linear`` through the compiled kernel (CPU): the weight's tensors are those of its panels."""

from __future__ import annotations

import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.layout import DTYPES, as_rows, output, scratch

KINDS = {"int4": 0, "int8": 1, "fp8": 2}
ACTIVATIONS = {"bf16": 0, "int8": 1, "fp8": 2}
EPILOGUES = {"none": 0, "gelu": 1, "gelu_tanh": 2, "swiglu": 3}
_STEP = {"int4": 8, "int8": 4, "fp8": 2}  # places


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
    """``[M, K]`` → ``[M, N]``, or ``[M, N / 2]`` of gates and ups."""
    tokens, width = input.shape
    columns = out_features // 2 if epilogue == "swiglu" else out_features
    result = output(out, (tokens, columns), input, input.dtype)
    if tokens == 0:
        return result
    input, input_row = as_rows(input)
    if input_scale is not None:
        input_scale = input_scale.float().contiguous()
    residual_row = 0
    if bias is not None:
        bias = bias.to(input.dtype).contiguous()
    if residual is not None:
        residual, residual_row = as_rows(residual.to(input.dtype))
    places = codes.shape[1] * _STEP[kind]
    pointers = (input, codes, scales, zeros, order, input_scale, bias, residual, result)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in pointers]
    sizes = (tokens, out_features, width, places, group, scales.shape[1], input_row, residual_row)
    options = (
        KINDS[kind],
        ACTIVATIONS[activation],
        EPILOGUES[epilogue],
        DTYPES[scales.dtype],
        DTYPES[input.dtype],
        torch.get_num_threads(),
    )
    _memory, address = scratch(_C.quantized_linear((*addresses, 0), sizes, options))
    _C.quantized_linear((*addresses, address), sizes, options)
    return result

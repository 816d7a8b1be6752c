"""``quantized_linear`` through the compiled kernel (CPU): the weight's tensors are those of its panels. On a GPU they
are canonical, and ``native_cuda.py`` serves."""

from __future__ import annotations

import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.gemm import native_cuda
from m4ov_kernels.gemm.options import ACTIVATIONS, EPILOGUES, KINDS
from m4ov_kernels.gemm.panels import PLACES
from m4ov_kernels.layout import DTYPES, as_rows, output, scratch


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
    if input.is_cuda:
        operands = (codes, scales, zeros, order, input_scale, bias, residual)
        scheme = (kind, out_features, group, activation, epilogue)
        return native_cuda.quantized_linear_fwd(input, *operands, *scheme, out=out)
    tokens, width = input.shape
    columns = out_features // 2 if epilogue == "swiglu" else out_features
    result = output(out, (tokens, columns), input, input.dtype)
    if tokens == 0:
        return result
    input, input_row = as_rows(input)
    codes, scales, zeros = codes.contiguous(), scales.contiguous(), None if zeros is None else zeros.contiguous()
    if input_scale is not None:
        input_scale = input_scale.float().contiguous()
    bias = None if bias is None else bias.contiguous()
    residual, residual_row = (None, 0) if residual is None else as_rows(residual)
    places = codes.shape[1] * PLACES[kind]
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

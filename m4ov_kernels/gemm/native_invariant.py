"""``invariant_linear`` through the compiled kernel (CPU)."""

from __future__ import annotations

import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.layout import DTYPES, as_rows, output, scratch


def invariant_linear_fwd(
    input: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool = False, out: Tensor | None = None
) -> Tensor:
    """``[T, K]`` and ``[N, K]`` (``transposed``: ``[K, N]``) → ``[T, N]``."""
    columns = weight.shape[1 if transposed else 0]
    result = output(out, (input.shape[0], columns), input, input.dtype)
    (input, input_row), (weight, weight_row) = as_rows(input), as_rows(weight)
    bias = None if bias is None else bias.contiguous()
    addresses = [input.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), result.data_ptr(), 0]
    sizes = (input.shape[0], columns, input.shape[1], input_row, weight_row)
    arguments = (sizes, transposed, DTYPES[input.dtype], torch.get_num_threads())
    _memory, addresses[4] = scratch(_C.invariant_linear(addresses, *arguments))
    _C.invariant_linear(addresses, *arguments)
    return result

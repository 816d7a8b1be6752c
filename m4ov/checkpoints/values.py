"""The values of quantised weights, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from m4ov.checkpoints.folder import Checkpoint, Weight
from m4ov_kernels.gemm.weights import Int4Weight, bits
from m4ov_kernels.gemm.weights.formats import awq, compressed_tensors_int4, gptq
from m4ov_kernels.gemm.weights.int4 import SYMMETRIC_ZERO

_AT_ONCE = 1 << 18  # values


def row_ranges(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Parts of [0, rows), each but the last a multiple of 128 rows, of a quarter of a million values or 128 rows."""
    step = max(128, _AT_ONCE // max(1, columns) // 128 * 128)
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def rows_of(weight: Weight, begin: int, end: int) -> Tensor:
    """float64 values of some output features, exact: with a ``pre_quant_scale``, the weight that acts on the input
    before that."""
    values = weight.rows(begin, end).dequantize(torch.float64)
    if isinstance(weight, Int4Weight) and weight.pre_quant_scale is not None:
        values *= weight.pre_quant_scale.double()
    return values


def dequantized(weight: Weight, dtype: torch.dtype) -> tuple[Tensor, float]:
    """([N, K] in ``dtype``, rounded once from the exact product; the largest relative error of a value)."""
    N, K = weight.shape
    made = torch.empty((N, K), dtype=dtype)
    off = 0.0
    for begin, end in row_ranges(N, K):
        exact = rows_of(weight, begin, end)
        made[begin:end] = exact.to(dtype)
        wrong = (made[begin:end].double() - exact).abs_() / exact.abs_().clamp_min_(torch.finfo(torch.float64).tiny)
        off = max(off, float(wrong.max()))
    return made, off


def even_zeros(checkpoint: Checkpoint) -> bool:
    """Whether every int4 weight is symmetric: without zero points, or with nothing but 8. These alone are read."""
    for module, tensors in checkpoint.modules.items():
        try:
            format = checkpoint.format_of(module)
        except (TypeError, ValueError):
            continue  # the reader has to say what is wrong
        if format in (awq.NAME, gptq.V1, gptq.V2):
            stored = tensors.get(f"{module}.qzeros")
            eight = SYMMETRIC_ZERO - 1 if format == gptq.V1 else SYMMETRIC_ZERO
            words = None if stored is None else stored.read()
        elif format == compressed_tensors_int4.NAME:
            stored, shape = tensors.get(f"{module}.weight_zero_point"), tensors.get(f"{module}.weight_shape")
            eight = SYMMETRIC_ZERO
            words = None if stored is None or shape is None else stored.read().T.contiguous()
        else:
            continue
        if words is None or words.dtype is not torch.int32 or words.dim() != 2:
            continue  # none, or the reader has to say what is wrong
        columns = words.shape[1] * bits.PER_WORD
        if format == compressed_tensors_int4.NAME:  # packed along the outputs, of which the last word may have fewer
            columns = min(columns, int(tensors[f"{module}.weight_shape"].read().flatten()[0]))
        if bool((bits.unpack_words(words, columns) != eight).any()):
            return False
    return True

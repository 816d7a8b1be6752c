"""``quantized_linear`` through CUDA C++: int4 weights by bfloat16 activations, for few rows.

A row's bits depend on that row, the weight and the kind of GPU alone.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.gemm.backward import by_parts
from m4ov_kernels.gemm.int4_cuda import unserved
from m4ov_kernels.gpu import current_device
from m4ov_kernels.layout import DTYPES, as_rows, output

_PER_PIECE = 8  # bfloat16 in 16 bytes
_ELEMENTS = 1 << 24  # of the weight that are dequantised at once, for the backward: 64 MiB in float32


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
    """``[M, K]`` → ``[M, N]``. The weight is canonical: ``codes`` uint8 ``[N, 4·⌈K/8⌉]``, ``scales`` and ``zeros``
    ``[N, G]``.

    Raises:
        RuntimeError: it has no kernel for these arguments, see :func:`m4ov_kernels.gemm.int4_cuda.unserved`.
    """
    _refuse_unserved(kind, input.shape[0], order, activation, epilogue)
    (rows, width), dtype = input.shape, input.dtype
    if codes.shape != (out_features, 4 * -(-width // 8)) or scales.shape[0] != out_features:
        raise ValueError(f"codes: expected [{out_features}, {4 * -(-width // 8)}], got {list(codes.shape)}")
    result = output(out, (rows, out_features), input, dtype)
    if rows == 0:
        return result
    input, input_row = _in_pieces(input)
    codes, scales = codes.contiguous(), scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual, residual_row = (None, 0) if residual is None else as_rows(residual)
    with current_device(input):
        multiprocessors, stream = _machine(input.device)
        blocks, partials, tiles = _C.int4_linear_cuda_plan(rows, out_features, width, multiprocessors)
        scratch = torch.empty(partials, dtype=torch.float32, device=input.device)
        arrivals = torch.zeros(tiles, dtype=torch.int32, device=input.device)
        tensors = (result, input, codes, scales, zeros, bias, residual, scratch, arrivals)
        addresses = tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
        sizes = (rows, out_features, width, input_row, residual_row, group, scales.shape[1], blocks)
        _C.int4_linear_cuda(addresses, sizes, DTYPES[scales.dtype], DTYPES[dtype], stream)
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
    """``[M, N]`` and the canonical weight of a forward above → ``grad_output @ weight``, ``[M, K]``, by PyTorch's
    products."""
    _refuse_unserved(kind, 0, order, "bf16", "none")

    def values(start: int, stop: int) -> Tensor:
        words = codes[:, start // 2 : -(-stop // 2)]
        weight = torch.stack((words & 15, words >> 4), dim=-1).flatten(1)[:, : stop - start].to(torch.float32)
        groups = torch.arange(start, stop, device=codes.device) // group
        weight -= 8.0 if zeros is None else zeros[:, groups].to(torch.float32)
        return (weight * scales[:, groups].to(torch.float32)).t()

    step = max(1, _ELEMENTS // codes.shape[0] // 2) * 2
    bounds = ((start, min(in_features, start + step)) for start in range(0, in_features, step))
    parts = ((slice(start, stop), values(start, stop)) for start, stop in bounds)
    return by_parts(grad_output, in_features, parts, lambda grad, part: grad @ part.t(), out)


def _refuse_unserved(kind: str, rows: int, order: Tensor | None, activation: str, epilogue: str) -> None:
    """The front door asks before; a call of the raw operator does not."""
    reason = unserved(kind, rows, order is not None, activation, epilogue)
    if reason is not None:
        raise RuntimeError(f"quantized_linear: no native kernel: {reason}")


def _in_pieces(input: Tensor) -> tuple[Tensor, int]:
    """bfloat16 ``[M, K]`` whose rows begin at 16 bytes, and their distance: the tensor itself, or a padded copy."""
    input, row = as_rows(input.to(torch.bfloat16))
    rows, width = input.shape
    padded = -(-width // _PER_PIECE) * _PER_PIECE
    if input.data_ptr() % 16 == 0 and (rows == 1 or row % _PER_PIECE == 0):
        return input, padded if rows == 1 else row
    copy = input.new_empty(rows, padded)
    copy[:, :width] = input
    return copy, padded


def _machine(device: torch.device) -> tuple[int, int]:
    """The number of multiprocessors, and the current stream."""
    return _multiprocessors(device.index), torch.cuda.current_stream(device).cuda_stream


@lru_cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)

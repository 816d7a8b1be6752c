"""The gradient of a quantised linear's input: the panels are dequantised a few input features at a time, and multiplied
by the kernel that keeps a row's bits. On a GPU the weight is canonical, and ``native_cuda.py`` serves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from m4ov_kernels.gemm import native_cuda
from m4ov_kernels.gemm.backward import by_parts
from m4ov_kernels.gemm.native_invariant import invariant_linear_fwd
from m4ov_kernels.gemm.panels import PANEL, PLACES

_ELEMENTS = 1 << 21  # of the weight that are dequantised at once: 8 MiB in float32


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
    """``[M, N]`` and a weight in panels (not paired) → ``grad_output @ weight``, ``[M, K]``."""
    if grad_output.is_cuda:
        operands = (codes, scales, zeros, order)
        return native_cuda.quantized_linear_bwd(grad_output, *operands, kind, in_features, group, out=out)
    columns, end = grad_output.shape[1], codes.shape[1] * PLACES[kind]
    step = max(8, _ELEMENTS // (codes.shape[0] * PANEL) // 8 * 8)

    def parts() -> Iterator[tuple[slice | Tensor, Tensor]]:
        for start in range(0, end, step):
            stop = min(end, start + step)
            values = _dequantized(codes, scales, zeros, kind, group, start, stop)[:, :columns]
            if order is None:
                stop = min(stop, in_features)
                yield slice(start, stop), values[: stop - start]
                continue
            features = order[start:stop].long()
            present = features >= 0
            if present.any():
                yield features[present], values[present]

    return by_parts(grad_output, in_features, parts(), lambda grad, part: invariant_linear_fwd(grad, part, None), out)


def _dequantized(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, kind: str, group: int, start: int, stop: int
) -> Tensor:
    """float32 [stop − start, P·64]: the weight's columns at these places."""
    places = PLACES[kind]
    words = codes[:, start // places : stop // places]  # [P, words, 64, bytes]
    if kind == "int4":
        values = torch.stack((words & 15, words >> 4), dim=-1).flatten(3)
    elif kind == "int8":
        values = words.to(torch.int16) - 128
    else:
        values = words.view(torch.float8_e4m3fn)
    by_place = values.permute(1, 3, 0, 2).to(torch.float32).reshape(stop - start, -1)  # [places, P·64]
    groups = torch.arange(start, stop, device=codes.device) // group

    def of_place(table: Tensor) -> Tensor:  # [P, G, 64] → [places, P·64]
        return table.transpose(0, 1).flatten(1).to(torch.float32)[groups]

    if kind == "int4":
        by_place -= 8.0 if zeros is None else of_place(zeros)
    return by_place * of_place(scales)

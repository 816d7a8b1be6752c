"""The mixture-of-experts operators through the compiled kernels (CPU)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.bounds import check_bounds
from m4ov_kernels.layout import DTYPES, as_rows, output, padded, row_blocks, scratch
from m4ov_kernels.moe.values import Routing, refuse_expert, refuse_order, routing

_Two = tuple[Tensor, Tensor]


def route_topk_fwd(logits: Tensor, top_k: int, normalize: bool, *, out: Routing | None = None) -> Routing:
    """``(weights, experts, counts, probability)``."""
    tokens, count = logits.shape
    weights, experts, counts, probability = routing(logits, top_k, out)
    logits, stride = as_rows(logits)
    blocks, threads = row_blocks(tokens), torch.get_num_threads()
    partials = torch.empty(blocks + threads, padded(count), dtype=torch.float32)
    addresses = [tensor.data_ptr() for tensor in (weights, experts, counts, probability, partials, partials[blocks:])]
    sizes = (tokens, count, stride, top_k, blocks)
    _C.route_topk_fwd([*addresses, logits.data_ptr()], sizes, normalize, DTYPES[logits.dtype], threads)
    return weights, experts, counts, probability


def route_topk_bwd(
    logits: Tensor,
    grad_weights: Tensor | None,
    grad_probability: Tensor | None,
    weights: Tensor,
    experts: Tensor,
    normalize: bool,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of ``logits``."""
    result = output(out, logits.shape, logits, logits.dtype)
    logits, stride = as_rows(logits)
    threads, top_k = torch.get_num_threads(), experts.shape[1]
    row = torch.empty(threads, 2 * padded(logits.shape[1]), dtype=torch.float32)
    grads = [None if grad is None else grad.contiguous() for grad in (grad_weights, grad_probability)]
    tensors = (result, row, logits, weights.contiguous(), experts.contiguous(), *grads)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    _C.route_topk_bwd(addresses, (*logits.shape, stride, top_k), normalize, DTYPES[logits.dtype], threads)
    return result


def permute_fwd(
    hidden_states: Tensor, experts: Tensor, num_experts: int, *, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(rows, order, offsets)``."""
    (tokens, width), top_k = hidden_states.shape, experts.shape[1]
    given = out or (None, None, None)
    rows = output(given[0], (tokens * top_k, width), hidden_states, hidden_states.dtype)
    order = output(given[1], (tokens, top_k), hidden_states, torch.int32)
    offsets = output(given[2], (num_experts + 1,), hidden_states, torch.int32)
    hidden_states, stride = as_rows(hidden_states)
    chosen, following = experts.contiguous(), torch.empty(num_experts, dtype=torch.int32)
    addresses = [tensor.data_ptr() for tensor in (rows, order, offsets, following, hidden_states, chosen)]
    sizes = (tokens, top_k, width, num_experts, stride)
    bad = _C.permute_fwd(addresses, sizes, DTYPES[rows.dtype], torch.get_num_threads())
    if bad >= 0:
        refuse_expert(experts, bad, num_experts)
    return rows, order, offsets


def permute_bwd(grad_rows: Tensor, order: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The gradient of ``hidden_states``."""
    return unpermute_fwd(grad_rows, order, None, out=out)


def unpermute_fwd(rows: Tensor, order: Tensor, weights: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """The weighted sums of the rows of each token."""
    (tokens, top_k), width = order.shape, rows.shape[1]
    result = output(out, (tokens, width), rows, rows.dtype)
    (rows, stride), order = as_rows(rows), order.contiguous()
    weights = None if weights is None else weights.contiguous()
    seen = torch.empty(tokens * top_k, dtype=torch.uint8)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (result, seen, rows, order, weights)]
    sizes = (tokens, top_k, width, stride)
    bad = _C.unpermute_fwd(addresses, sizes, DTYPES[rows.dtype], torch.get_num_threads())
    if bad >= 0:
        refuse_order(order, bad)
    return result


def unpermute_bwd(
    grad_output: Tensor,
    rows: Tensor | None,
    order: Tensor,
    weights: Tensor | None,
    need_rows: bool,
    need_weights: bool,
    *,
    out: _Two | None = None,
) -> _Two:
    """``(grad_rows, grad_weights)``; what is not needed is empty."""
    (tokens, top_k), width = order.shape, grad_output.shape[1]
    given = out or (None, None)
    shapes = ((tokens * top_k, width) if need_rows else (0,), (tokens, top_k) if need_weights else (0,))
    grad_rows = output(given[0], shapes[0], grad_output, grad_output.dtype)
    grad_weights = output(given[1], shapes[1], grad_output, torch.float32)
    (grad_output, grad_stride), row_stride = as_rows(grad_output), 0
    if rows is not None:
        rows, row_stride = as_rows(rows)
    elif need_weights:
        raise ValueError("unpermute_bwd: rows must be given for the gradient of weights")
    order, weights = order.contiguous(), None if weights is None else weights.contiguous()
    seen = torch.empty(tokens * top_k, dtype=torch.uint8)
    wanted = (grad_rows if need_rows else None, grad_weights if need_weights else None)
    tensors = (*wanted, seen, grad_output, rows, order, weights)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    sizes = (tokens, top_k, width, grad_stride, row_stride)
    bad = _C.unpermute_bwd(addresses, sizes, DTYPES[grad_output.dtype], torch.get_num_threads())
    if bad >= 0:
        refuse_order(order, bad)
    return grad_rows, grad_weights


def grouped_linear_fwd(rows: Tensor, weight: Tensor, offsets: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``[S, N]``."""
    result = output(out, (rows.shape[0], weight.shape[1]), rows, rows.dtype)
    _multiply(result, rows, weight, _bounds(offsets, rows))
    return result


def grouped_linear_bwd(
    grad_output: Tensor,
    rows: Tensor,
    weight: Tensor,
    offsets: Tensor,
    need_rows: bool,
    need_weight: bool,
    *,
    out: _Two | None = None,
) -> _Two:
    """``(grad_rows, grad_weight)``; what is not needed is empty."""
    given, bounds = out or (None, None), _bounds(offsets, rows)
    grad_rows = output(given[0], rows.shape if need_rows else (0,), rows, rows.dtype)
    grad_weight = output(given[1], weight.shape if need_weight else (0,), rows, rows.dtype)
    if need_rows:
        _multiply(grad_rows, grad_output, weight.mT, bounds)
    if need_weight:
        (grad_output, grad_stride), (rows, row_stride) = as_rows(grad_output), as_rows(rows)
        addresses = [grad_weight.data_ptr(), grad_output.data_ptr(), rows.data_ptr(), bounds.data_ptr(), 0]
        arguments = ((*weight.shape, grad_stride, row_stride), DTYPES[rows.dtype], torch.get_num_threads())
        _run(_C.grouped_linear_weight, addresses, arguments)
    return grad_rows, grad_weight


def _bounds(offsets: Tensor, rows: Tensor) -> Tensor:
    check_bounds("grouped_linear", "offsets", offsets, rows.shape[0])
    return offsets.to(torch.int64).contiguous()


def _multiply(result: Tensor, rows: Tensor, weight: Tensor, bounds: Tensor) -> None:
    """``weight``: ``[E, N, K]``, of which rows or columns are dense, or a copy is made."""
    experts, columns, width = weight.shape
    rows, row_stride = as_rows(rows)
    if weight.stride(2) != 1 and weight.stride(1) != 1:
        weight = weight.contiguous()
    across = weight.stride(2) != 1
    strides = (weight.stride(2) if across else weight.stride(1), weight.stride(0))
    addresses = [result.data_ptr(), rows.data_ptr(), weight.data_ptr(), bounds.data_ptr(), 0]
    sizes = (experts, columns, width, row_stride, *strides)
    _run(_C.grouped_linear, addresses, (sizes, across, DTYPES[rows.dtype], torch.get_num_threads()))


def _run(kernel: Any, addresses: list[int], arguments: tuple[Any, ...]) -> None:
    _memory, addresses[-1] = scratch(kernel(addresses, *arguments))
    kernel(addresses, *arguments)

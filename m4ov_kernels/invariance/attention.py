"""PyTorch's attention, batched, masked and cached, as attention inside sequences: the same bits for the same tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from m4ov_kernels.attention import varlen_attention

_OP = "invariant(): scaled_dot_product_attention"


class _Span(NamedTuple):
    """Queries ``[first, last)`` of one row of the batch, and the keys that they see; ``causal``: each one key more than
    the query before it, the last all of them."""

    row: int
    first: int
    last: int
    keys: tuple[int, int]
    causal: bool


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` of ``[B, H, Q, D]`` by :func:`m4ov_kernels.varlen_attention`. A mask must show
    a query a run of keys, as those of padding and of a cache do; what a query sees nothing of is 0.

    Raises:
        RuntimeError: dropout, other shapes, or any other mask.
    """
    if dropout_p or query.ndim != 4 or query.shape[-1] != value.shape[-1]:
        raise RuntimeError(
            f"{_OP}: [B, H, Q, D] without dropout is what is served; got dropout {dropout_p}, "
            f"query {list(query.shape)}, value {list(value.shape)}"
        )
    if key.shape[1] != query.shape[1] and not enable_gqa:
        raise RuntimeError(f"{_OP}: {key.shape[1]} heads of keys for {query.shape[1]} of queries without enable_gqa")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rows, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if attn_mask is None:
        if is_causal and queries != keys:
            raise RuntimeError(f"{_OP}: is_causal of {queries} queries and {keys} keys")
        spans = [_Span(row, 0, queries, (0, keys), is_causal) for row in range(rows)]
    else:
        spans = _spans(_visible(attn_mask, rows, queries, keys, is_causal))
    if (
        rows == len(spans) == 1 and spans[0].first == 0 and spans[0].last == queries
    ):  # as in decoding: nothing is copied
        return _attend(query, key, value, spans, spans[0].causal, scale)[None].transpose(1, 2)
    output = torch.zeros_like(query.transpose(1, 2), memory_format=torch.contiguous_format)  # [B, Q, H, D]
    for causal in (False, True):
        of_kind = [span for span in spans if span.causal is causal and span.first < span.last]
        if of_kind:
            output = _put(output, of_kind, _attend(query, key, value, of_kind, causal, scale))
    return output.transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, spans: list[_Span], causal: bool, scale: float | None) -> Tensor:
    q = _joined([query[span.row, :, span.first : span.last] for span in spans])
    k, v = (_joined([x[span.row, :, slice(*span.keys)] for span in spans]) for x in (key, value))
    bounds = torch.tensor([0, *(span.last - span.first for span in spans)]).cumsum(0)
    bounds_k = torch.tensor([0, *(span.keys[1] - span.keys[0] for span in spans)]).cumsum(0)
    return varlen_attention(q, k, v, bounds, cu_seqlens_k=bounds_k, causal=causal, scale=scale, invariant=True)


def _joined(parts: list[Tensor]) -> Tensor:
    """``[H, T, D]`` each → ``[T, H, D]``, one after the other."""
    return parts[0].transpose(0, 1) if len(parts) == 1 else torch.cat([part.transpose(0, 1) for part in parts])


def _put(output: Tensor, spans: list[_Span], attended: Tensor) -> Tensor:
    """``attended`` in the places of its queries."""
    length = output.shape[1]
    places = torch.cat([torch.arange(span.first, span.last) + span.row * length for span in spans])
    return output.flatten(0, 1).index_copy(0, places, attended).view_as(output)


def _visible(mask: Tensor, rows: int, queries: int, keys: int, is_causal: bool) -> Tensor:
    """Which keys a query sees, bool ``[B, Q, K]``."""
    if is_causal or mask.ndim != 4 or mask.shape[1] != 1:
        raise RuntimeError(f"{_OP}: a mask [B, 1, Q, K] and not causal is what is served; got {list(mask.shape)}")
    if mask.dtype is not torch.bool:
        if not bool(((mask == 0) | (mask <= torch.finfo(mask.dtype).min)).all()):
            raise RuntimeError(f"{_OP}: a mask that adds to scores")
        mask = mask == 0
    return mask[:, 0].expand(rows, queries, keys)


def _spans(visible: Tensor) -> list[_Span]:
    _, queries, keys = visible.shape
    counts = visible.sum(-1)  # [B, Q]
    first = visible.int().argmax(-1)
    place = torch.arange(keys)
    runs = (place >= first[..., None]) & (place < (first + counts)[..., None])
    if not bool((runs == visible).all()):
        raise RuntimeError(f"{_OP}: a mask that does not show each query a run of keys")
    spans: list[_Span] = []
    for row, (begins, sizes) in enumerate(zip(first.tolist(), counts.tolist(), strict=True)):
        at = 0
        while at < queries:
            if sizes[at] == 0:
                at += 1
                continue
            end, causal = at + 1, True
            step = sizes[end] - sizes[at] if end < queries and begins[end] == begins[at] else None
            if step in (0, 1):
                while end < queries and begins[end] == begins[at] and sizes[end] == sizes[end - 1] + step:
                    end += 1
                causal = step == 1
            spans.append(_Span(row, at, end, (begins[at], begins[at] + sizes[end - 1]), causal))
            at = end
    return spans

"""Attention inside the sequences of a packed batch, without a mask over all pairs of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from m4ov_kernels.nn.packing import Group, PackedSequences

# On the CPU, sequences up to this long go through batched matrix products in float32. Measured on two Zen 4 cores,
# forward + backward against `scaled_dot_product_attention` on the same batch: 2 to 10 times faster at length 16,
# 1.0 (fp32) to 2.0 (bf16) at 128; beyond that the memory for the probabilities buys nothing.
_SHORT = 128


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: PackedSequences,
    *,
    is_causal: bool,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention of each token to its own sequence (causal: to it and what precedes it there).

    Args:
        query: ``[B, H, T, D]``; any strides.
        key, value: ``[B, KV, T, D]`` with ``H`` a multiple of ``KV`` (grouped queries).
        packing: the sequences of the ``B·T`` tokens, row after row.
        is_causal: whether a token attends to later ones.
        scale: of the scores; ``None``: ``1/sqrt(D)``.
        dropout: of the attention probabilities.

    Returns:
        ``[B, T, H, D]``, contiguous, in the dtype of ``query``. Short sequences are computed in float32 on the CPU,
        all others by ``torch.nn.functional.scaled_dot_product_attention``.

    Raises:
        ValueError: ``packing`` is of another number of tokens, or the shapes do not fit.
    """
    batch, heads, length, head_dim = query.shape
    if packing.tokens != batch * length:
        raise ValueError(f"packed_attention: packing has {packing.tokens} tokens; query has {batch} x {length}")
    if key.shape != value.shape or key.shape[2:] != query.shape[2:] or heads % key.shape[1]:
        raise ValueError(
            f"packed_attention: key and value must be [{batch}, KV, {length}, {head_dim}] with KV dividing {heads}; "
            f"got {list(key.shape)} and {list(value.shape)}"
        )
    padded = [packing.pad(x.transpose(1, 2).flatten(0, 1)) for x in (query, key, value)]  # [slots, H | KV, D]
    scale = head_dim**-0.5 if scale is None else scale
    outputs, first = [], 0
    for group in packing.groups:
        slots = slice(first, first + group.count * group.length)
        q, k, v = (x[slots].view(group.count, group.length, -1, head_dim) for x in padded)  # [N, L, H | KV, D]
        valid = None
        if not (group.even or is_causal) and packing.valid is not None:
            valid = packing.valid[slots].view(group.count, group.length)
        short = query.device.type == "cpu" and group.length <= _SHORT and not dropout
        if short:
            output = _short(q, k, v, valid, is_causal, scale)
        else:
            output = _long(q, k, v, valid, group, is_causal, scale, dropout)
        outputs.append(output.reshape(-1, heads, head_dim))
        first = slots.stop
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs) if outputs else query.new_empty(0, heads, head_dim)
    return packing.unpad(output).view(batch, length, heads, head_dim)


def _short(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    count, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    rows = count * kv_heads
    dtype = torch.promote_types(query.dtype, torch.float32)
    # The queries that share a key head stand below each other: [N·KV, G·L, D].
    q = query.to(dtype).view(count, length, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4).reshape(rows, -1, head_dim)
    k, v = (x.to(dtype).transpose(1, 2).reshape(rows, length, head_dim) for x in (key, value))
    bias = None
    if is_causal:
        bias = torch.full((length, length), float("-inf"), dtype=dtype, device=q.device).triu(1)
        bias = bias.repeat(heads // kv_heads, 1)
    elif valid is not None:
        bias = torch.zeros(valid.shape, dtype=dtype, device=q.device).masked_fill_(~valid, float("-inf"))
        bias = bias.repeat_interleave(kv_heads, dim=0)[:, None]  # [N·KV, 1, L]
    if bias is None:
        scores = torch.bmm(q * scale, k.transpose(1, 2))
    else:
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
    output = torch.bmm(torch.softmax(scores, dim=-1), v).to(query.dtype)
    return output.view(count, kv_heads, -1, length, head_dim).permute(0, 3, 1, 2, 4).reshape(query.shape)


def _long(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    group: Group,
    is_causal: bool,
    scale: float,
    dropout: float,
) -> Tensor:
    repeats = query.shape[2] // key.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if valid is not None and repeats > 1:  # with a mask, grouped queries have no fast kernel on a GPU
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    output = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if valid is None else valid[:, None, None],
        dropout_p=dropout,
        is_causal=is_causal and group.length > 1,
        scale=scale,
        enable_gqa=valid is None and repeats > 1,
    )
    return output.transpose(1, 2)

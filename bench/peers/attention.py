"""Peers of attention inside packed sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_bench.peers.base import Compiled, Peer, compiled_peer


def varlen_attention(sizes: Sequence[int], causal: bool, compiled: Compiled = True) -> dict[str, Peer]:
    """Functions of ``(q, k, v)``, ``[T, H | KV, D]``. ``eager``: PyTorch's attention, sequence by sequence (its varlen
    attention has no CPU kernel). ``torch.compile``: of the call with a mask over all pairs."""
    lengths = torch.tensor(sizes)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), lengths)
    visible = owner[:, None] == owner
    visible = visible.tril() if causal else visible

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H | KV, T, D]
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return output[0].transpose(0, 1)

    def per_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(list(sizes)) for x in (q, k, v)), strict=True)
        return torch.cat([attention(*part, None) for part in parts])

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, visible)

    peers: dict[str, Peer] = {"eager": per_sequence, "SDPA with a mask": masked}
    peers["torch.compile"] = compiled_peer(masked, compiled)
    return peers


def decoding(sequences: int, keys: int) -> dict[str, Peer]:
    """Functions of ``(q, k, v)``, ``[sequences, H, D]`` and ``[sequences · keys, KV, D]``, as one batch: of one
    length. ``eager``: as Hugging Face's eager attention does it."""

    def batch(x: Tensor) -> Tensor:
        return x.unflatten(0, (sequences, -1)).transpose(1, 2)  # [N, H | KV, 1 | S, D]

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = F.scaled_dot_product_attention(*map(batch, (q, k, v)), enable_gqa=q.shape[1] != k.shape[1])
        return output.transpose(1, 2).flatten(0, 1)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = map(batch, (q, k, v))
        key, value = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (key, value))
        scores = query @ key.mT * q.shape[2] ** -0.5
        p = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        return (p @ value).transpose(1, 2).flatten(0, 1)

    return {"eager": eager, "SDPA": sdpa}

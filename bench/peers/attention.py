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

"""Peers of the rotary embeddings: the code of Hugging Face's Qwen3-VL, angles included, as every layer's share of them
would have to be without tensors of sines and cosines; and with those tensors at hand, for which nothing is counted."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from m4ov_bench.peers.base import Absent, Compiled, Peer, compiled_peer, transformers_module

_MODELING = "transformers.models.qwen3_vl.modeling_qwen3_vl"


def qk_norm_mrope(
    positions: Tensor, sections: list[int], theta: float, eps: float, norm: bool, dim: int, compiled: Compiled = True
) -> dict[str, Peer]:
    """Functions of ``(q, k[, q_weight, k_weight])``, ``[T, H, D]``; ``positions`` int64 ``[3, T]``."""
    modeling = transformers_module(_MODELING)
    if isinstance(modeling, Absent):
        return {"Hugging Face": modeling, "torch.compile": modeling}
    parameters = {"rope_type": "default", "rope_theta": theta, "mrope_section": sections}
    config = SimpleNamespace(rope_parameters=parameters, head_dim=dim, max_position_embeddings=1 << 18)
    rotary = modeling.Qwen3VLTextRotaryEmbedding(config).to(positions.device)

    def normed(x: Tensor, weight: Tensor) -> Tensor:  # Qwen3VLTextRMSNorm.forward, with the weight as an argument
        exact = x.to(torch.float32)
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
        return weight * exact.to(x.dtype)

    def turned(q: Tensor, k: Tensor, weights: tuple[Tensor, ...], cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        if norm:
            q, k = normed(q, weights[0]), normed(k, weights[1])
        made = modeling.apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
        return tuple(x[0] for x in made)

    def whole(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return turned(q, k, weights, *rotary(q, positions[:, None]))

    return _peers(whole, lambda q: rotary(q, positions[:, None]), turned, compiled)


def vision_rope(positions: Tensor, theta: float, dim: int, compiled: Compiled = True) -> dict[str, Peer]:
    """Functions of ``(q, k)``, ``[N, H, D]``; ``positions`` int64 ``[N, 2]``."""
    modeling = transformers_module(_MODELING)
    if isinstance(modeling, Absent):
        return {"Hugging Face": modeling, "torch.compile": modeling}
    parameters = {"rope_type": "axial", "rope_theta": theta}
    config = SimpleNamespace(rope_parameters=parameters, head_dim=dim)
    rotary = modeling.Qwen3VLVisionRotaryEmbedding(config).to(positions.device)

    def turned(q: Tensor, k: Tensor, _: tuple[Tensor, ...], cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = modeling.apply_rotary_pos_emb_vision(q, k, cos, sin)
        return made

    def whole(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return turned(q, k, (), *rotary(q, positions))

    return _peers(whole, lambda q: rotary(q, positions), turned, compiled)


def _peers(
    whole: Callable[..., Any], angles: Callable[[Tensor], Any], turned: Callable[..., Any], compiled: Compiled
) -> dict[str, Peer]:
    made: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def given(turn: Callable[..., Any]) -> Callable[..., Any]:
        def call(q: Tensor, k: Tensor, *weights: Tensor) -> Any:
            if q.dtype not in made:
                made[q.dtype] = angles(q)
            return turn(q, k, weights, *made[q.dtype])

        return call

    peers: dict[str, Peer] = {"Hugging Face": whole, "Hugging Face, given sin and cos": given(turned)}
    peers["torch.compile"] = compiled_peer(whole, compiled)
    with_tables = compiled_peer(turned, compiled)
    name = "torch.compile, given sin and cos"
    peers[name] = with_tables if isinstance(with_tables, Absent) else given(with_tables)
    return peers

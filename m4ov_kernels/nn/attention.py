"""Attention of packed samples and of packed images, rotated from integer positions: no sines and cosines are made."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from m4ov_kernels.attention import varlen_attention
from m4ov_kernels.nn.norm import RMSNorm
from m4ov_kernels.nn.plain import is_plain
from m4ov_kernels.rope import qk_norm_mrope
from m4ov_kernels.vision import vision_rope


class Rotation(NamedTuple):
    """How queries and keys of text are rotated: see :func:`m4ov_kernels.qk_norm_mrope`."""

    theta: float
    mrope_section: tuple[int, ...] | None
    interleaved: bool


class TextAttention(nn.Module):
    """Grouped-query causal attention with M-RoPE (or RoPE), with or without norms of queries and keys; parameters named
    as in Hugging Face's modules.

    Args:
        hidden_size: width of input and output.
        num_attention_heads, num_key_value_heads: of queries, of keys and values.
        head_dim: width of one.
        rotation: of queries and keys.
        qk_norm: whether each head of queries and keys has an RMSNorm before.
        eps: of these norms.
        bias: whether the projections of queries, keys and values have one.
        output_bias: whether the output's has one.
    """

    rotation: Any

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        rotation: Rotation,
        qk_norm: bool = True,
        eps: float = 1e-6,
        bias: bool = False,
        output_bias: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim, self.rotation, self.scaling = head_dim, rotation, head_dim**-0.5
        self.q_proj = nn.Linear(hidden_size, num_attention_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_attention_heads * head_dim, hidden_size, bias=output_bias)
        self.q_norm, self.k_norm = (RMSNorm(head_dim, eps) if qk_norm else None for _ in range(2))

    def project(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[..., hidden_size]`` and positions ``[3, ...]`` (``[...]``: one axis) → queries ``[..., H, D]``, keys and
        values ``[..., KV, D]``; queries and keys normalised and rotated."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (projection(hidden_states).view(shape) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q_weight, k_weight, eps = None, None, 0.0
        # Hugging Face's attention without norms has no such attribute.
        q_norm, k_norm = getattr(self, "q_norm", None), getattr(self, "k_norm", None)
        if q_norm is not None and k_norm is not None:
            if is_plain(q_norm) and is_plain(k_norm):
                q_weight, k_weight, eps = q_norm.weight, k_norm.weight, float(q_norm.variance_epsilon)
            else:
                q, k = q_norm(q), k_norm(k)
        # Under autocast the projections are narrower than what came in; what follows is not.
        dtype = torch.promote_types(q.dtype, hidden_states.dtype)
        q, k = qk_norm_mrope(
            q.to(dtype),
            k.to(dtype),
            q_weight,
            k_weight,
            position_ids,
            mrope_section=self.rotation.mrope_section if position_ids.ndim == hidden_states.ndim else None,
            theta=self.rotation.theta,
            eps=eps,
            interleaved=self.rotation.interleaved,
        )
        return q, k, v

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None
    ) -> Tensor:
        """``[T, hidden_size]`` → ``[T, hidden_size]``, samples as :func:`m4ov_kernels.varlen_attention` has them."""
        q, k, v = self.project(hidden_states, position_ids)
        q, k = q.to(v.dtype), k.to(v.dtype)
        attended = varlen_attention(q, k, v, cu_seqlens, max_seqlen=max_seqlen, causal=True, scale=self.scaling)
        return self.o_proj(attended.flatten(-2))


class PatchOrder(NamedTuple):
    """Where the patches of a vision tower stand in their images: by their grids, or each by its row and column."""

    grid_thw: Tensor | None
    merge_size: int
    positions: Tensor | None = None
    theta: float = 10000.0


class VisionAttention(nn.Module):
    """Full attention inside each image, rotated by rows and columns; parameters named as in Hugging Face's modules.

    Args:
        hidden_size: width of input and output.
        num_heads: how many, of width ``hidden_size / num_heads``.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def project(self, hidden_states: Tensor, order: PatchOrder) -> tuple[Tensor, Tensor, Tensor]:
        """``[N, hidden_size]`` → queries and keys, rotated, and values, ``[N, H, D]``."""
        shape = (hidden_states.shape[0], 3, self.num_heads, self.head_dim)
        q, k, v = self.qkv(hidden_states).view(shape).unbind(1)
        q, k = vision_rope(
            q, k, order.grid_thw, merge_size=order.merge_size, positions=order.positions, theta=order.theta
        )
        return q, k, v

    def forward(
        self, hidden_states: Tensor, order: PatchOrder, cu_seqlens: Tensor, max_seqlen: int | None = None
    ) -> Tensor:
        """``[N, hidden_size]`` → ``[N, hidden_size]``."""
        q, k, v = self.project(hidden_states, order)
        attended = varlen_attention(q, k, v, cu_seqlens, max_seqlen=max_seqlen, causal=False, scale=self.scaling)
        return self.proj(attended.flatten(-2))

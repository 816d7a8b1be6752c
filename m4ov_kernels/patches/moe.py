"""Fronts of transformers' mixture of experts: the router and the experts of Qwen3-VL-MoE."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_kernels.moe import route_topk
from m4ov_kernels.nn import MoEExperts


class Router:
    """Front of the router: what transformers returns, but for the weights, which stay in float32."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[..., H]`` → ``(logits [T, E], weights [T, K], experts [T, K])``."""
        router: Any = self
        logits = F.linear(hidden_states.reshape(-1, router.hidden_dim), router.weight)
        weights, experts, _ = route_topk(logits, top_k=router.top_k)
        return logits, weights, experts.to(torch.int64)


class Experts(MoEExperts):
    """Front of the experts."""

    def forward(self, hidden_states: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """``[T, H]``, ``[T, K]``, ``[T, K]`` → ``[T, H]``; indices and weights of any dtype."""
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        return super().forward(hidden_states, experts.to(torch.int32), weights.to(wide))

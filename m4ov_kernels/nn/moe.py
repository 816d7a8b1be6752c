"""Mixture of experts as modules: router, experts, and the block of both."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m4ov_kernels.activation import swiglu
from m4ov_kernels.moe import ExpertLoad, grouped_linear, permute, route_topk, unpermute


class MoERouter(nn.Module):
    """Logits of the experts and :func:`m4ov_kernels.route_topk` of them; ``weight [E, H]`` as in Hugging Face's router.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K, experts of a token.
        normalize: whether the weights of a token are divided by their sum.
    """

    normalize = True  # on the class too: a patched Hugging Face module has no such attribute of its own

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, *, normalize: bool = True) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)
        if normalize is not self.normalize:
            self.normalize = normalize

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, ExpertLoad]:
        """``[T, H]`` → ``(weights [T, K] float32, experts [T, K] int32, load)``."""
        return route_topk(F.linear(hidden_states, self.weight), top_k=self.top_k, normalize=self.normalize)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, num_experts={self.num_experts}, top_k={self.top_k}"


class MoEExperts(nn.Module):
    """Gated feed-forward blocks, one an expert; parameters named and laid out as in Hugging Face's modules.

    Args:
        hidden_size: H.
        intermediate_size: I, the width of one expert's gate.
        num_experts: E.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        for parameter in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, hidden_states: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """``[T, H]``, ``[T, K]`` int32, ``[T, K]`` float32 → ``[T, H]``."""
        rows, order, offsets = permute(hidden_states, experts, self.num_experts)
        return unpermute(self.grouped(rows, offsets), order, weights).to(hidden_states.dtype)

    def grouped(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """``[S, H]``, ordered by expert, and ``[E + 1]`` → ``[S, H]``, under autocast in its dtype: what expert
        parallelism calls with the rows that came to this rank."""
        rows, gate_up_proj, down_proj = _autocast(rows, self.gate_up_proj, self.down_proj)
        gate, up = grouped_linear(rows, gate_up_proj, offsets).chunk(2, -1)
        return grouped_linear(swiglu(gate, up), down_proj, offsets)

    def extra_repr(self) -> str:
        count, hidden, intermediate = self.down_proj.shape
        return f"{hidden}, {intermediate}, num_experts={count}"


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As ``F.linear`` takes its arguments under autocast."""
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype is torch.float64 else x.to(dtype) for x in tensors)


class MoE(nn.Module):
    """The block: every token to the experts that its router chooses; submodules named as in Hugging Face's modules.

    Args:
        hidden_size: H.
        intermediate_size: I, the width of one expert's gate.
        num_experts, top_k, normalize: as in :class:`MoERouter`.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int, *, normalize: bool = True
    ) -> None:
        super().__init__()
        self.gate = MoERouter(hidden_size, num_experts, top_k, normalize=normalize)
        self.experts = MoEExperts(hidden_size, intermediate_size, num_experts)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ExpertLoad]:
        """``[..., H]`` → ``([..., H], load)``."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, experts, load = self.gate(flat)
        return self.experts(flat, experts, weights).view(hidden_states.shape), load


def load_balancing_loss(loads: Iterable[ExpertLoad], *, tokens: int | Tensor) -> Tensor:
    """``E · Σₑ fₑ · Pₑ``, scalar, differentiable, as Hugging Face computes it: over all layers together, ``fₑ`` is how
    many tokens chose the expert, over their number, and ``Pₑ`` the mean of its probability. Balanced it is K, the
    experts of a token.

    Args:
        loads: of each layer; all saw the same tokens.
        tokens: how many those were.

    Raises:
        ValueError: there are no loads.

    Source: Fedus et al., "Switch Transformers", arXiv 2101.03961, equations 4 to 6.
    """
    loads = tuple(loads)
    if not loads:
        raise ValueError("load_balancing_loss: loads must be at least one ExpertLoad; got none")
    probability = torch.stack([load.probability for load in loads]).mean(0)
    share = torch.stack([load.counts for load in loads]).sum(0).to(probability.dtype) / (len(loads) * tokens)
    return share.shape[0] * (share * probability).sum()

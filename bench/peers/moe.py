"""Peers of the mixture-of-experts operators."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_bench.peers.base import Absent, Peer, transformers_module


def grouped_linear(offsets: Tensor) -> dict[str, Peer]:
    """Functions of ``(rows, weight)``. ``eager``: expert by expert, the bounds known on the host."""
    sizes, ends = offsets.diff().tolist(), offsets[1:].to(torch.int32)

    def eager(rows: Tensor, weight: Tensor) -> Tensor:
        # split, not rows[first:end]: the gradient of that is as large as all rows, for every expert
        parts = zip(rows.split(sizes), weight.unbind(), strict=True)
        return torch.cat([F.linear(part, matrix) for part, matrix in parts])

    def grouped(rows: Tensor, weight: Tensor) -> Tensor:
        return torch._grouped_mm(rows, weight.mT, offs=ends)

    peers: dict[str, Peer] = {"eager": eager}
    found = hasattr(torch, "_grouped_mm")
    peers["torch._grouped_mm"] = grouped if found else Absent("this PyTorch has no _grouped_mm")
    return peers


def experts_block(experts: Tensor, weights: Tensor, num_experts: int) -> dict[str, Peer]:
    """Functions of ``(hidden_states, gate_up_proj, down_proj)``: Hugging Face's experts of Qwen3-VL-MoE, by each of its
    implementations that is not made for few tokens."""
    modeling = transformers_module("transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe")
    if isinstance(modeling, Absent):
        return {"Hugging Face's loop": modeling, "Hugging Face's grouped_mm": modeling}
    return {
        f"Hugging Face's {name}": _hugging_face(modeling, implementation, experts.long(), weights, num_experts)
        for name, implementation in (("loop", "eager"), ("grouped_mm", "grouped_mm"))
    }


def _hugging_face(modeling: Any, implementation: str, experts: Tensor, weights: Tensor, num_experts: int) -> Peer:
    from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig

    def call(hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
        config = Qwen3VLMoeTextConfig(
            hidden_size=hidden_states.shape[1],
            moe_intermediate_size=down_proj.shape[2],
            num_experts=num_experts,
            num_experts_per_tok=experts.shape[1],
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = modeling.Qwen3VLMoeTextExperts(config)
        tensors = {"gate_up_proj": gate_up_proj, "down_proj": down_proj}
        arguments = (hidden_states, experts, weights.to(hidden_states.dtype))
        made: Tensor = torch.func.functional_call(module, tensors, arguments)
        return made

    return call


def permute(experts: Tensor) -> dict[str, Peer]:
    """Functions of ``hidden_states``: a stable sort and an index."""
    flat, top_k = experts.flatten(), experts.shape[1]

    def eager(hidden_states: Tensor) -> Tensor:
        return hidden_states[flat.argsort(stable=True) // top_k]

    return {"eager": eager}


def unpermute(order: Tensor) -> dict[str, Peer]:
    """Functions of ``(rows, weights)``."""
    slots = order.flatten().long()

    def eager(rows: Tensor, weights: Tensor) -> Tensor:
        return (rows[slots].view(*order.shape, -1) * weights[..., None]).sum(1).to(rows.dtype)

    token = torch.empty_like(slots).scatter(0, slots, torch.arange(len(slots), device=slots.device) // order.shape[1])
    back = torch.empty_like(slots).scatter(0, slots, torch.arange(len(slots), device=slots.device))

    def index_add(rows: Tensor, weights: Tensor) -> Tensor:
        weighted = rows * weights.flatten()[back, None].to(rows.dtype)
        return rows.new_zeros(order.shape[0], rows.shape[1]).index_add(0, token, weighted)

    return {"eager": eager, "index_add": index_add}


def route_topk(top_k: int) -> dict[str, Peer]:
    """Functions of ``logits``: what Hugging Face's router makes of them, with the load."""

    def eager(logits: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = torch.softmax(logits, -1, dtype=torch.float32)
        weights, experts = probabilities.topk(top_k, -1)
        torch.bincount(experts.flatten(), minlength=logits.shape[1])
        return weights / weights.sum(-1, keepdim=True), probabilities.mean(0)

    return {"eager": eager}

"""Peers of the normalisations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_bench.peers.base import Absent, Compiled, Peer, compiled_peer, runtime_peers, transformers_module


def rms_norm(weight: Tensor, eps: float, residual: bool, compiled: Compiled = True) -> dict[str, Peer]:
    """Functions of ``(hidden_states, weight[, residual])``; with a residual they return (normed, sum)."""

    def with_residual(norm: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
        if not residual:
            return norm

        def add_norm(hidden_states: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            total = hidden_states + residual
            return norm(total, weight), total

        return add_norm

    def eager(hidden_states: Tensor, weight: Tensor) -> Tensor:
        x = hidden_states.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return weight * x.to(hidden_states.dtype)

    def functional(hidden_states: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden_states, weight.shape, weight, eps)

    peers: dict[str, Peer] = {"eager": with_residual(eager), "F.rms_norm": with_residual(functional)}
    modeling = transformers_module("transformers.models.qwen3_vl.modeling_qwen3_vl")
    if isinstance(modeling, Absent):
        peers["Hugging Face"] = modeling
    else:
        module = modeling.Qwen3VLTextRMSNorm(weight.shape[0], eps)
        del module.weight

        def hugging_face(hidden_states: Tensor, weight: Tensor) -> Tensor:
            module.__dict__["weight"] = weight  # a plain attribute: the weight is this call's argument
            return module(hidden_states)

        peers["Hugging Face"] = with_residual(hugging_face)
    peers["torch.compile"] = compiled_peer(with_residual(eager), compiled)
    if not residual:
        # onnxruntime's fused operator; its RMSNormalization (opset 23) has no bf16 on the CPU.
        nodes = [("SimplifiedLayerNormalization", ["x", "w"], ["y"], {"axis": -1, "epsilon": eps})]
        peers |= runtime_peers(eager, nodes, ["x", "w"], compiled)
    return peers


def layer_norm(eps: float, residual: bool, compiled: Compiled = True) -> dict[str, Peer]:
    """Functions of ``(hidden_states, weight, bias[, residual])``. Hugging Face's vision towers call ``nn.LayerNorm``,
    which is the eager expression."""

    def eager(hidden_states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(hidden_states, weight.shape, weight, bias, eps)

    def add_norm(hidden_states: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = hidden_states + residual
        return eager(total, weight, bias), total

    function: Callable[..., Any] = add_norm if residual else eager
    peers: dict[str, Peer] = {"eager": function, "torch.compile": compiled_peer(function, compiled)}
    if not residual:
        nodes = [("LayerNormalization", ["x", "w", "b"], ["y"], {"axis": -1, "epsilon": eps})]
        peers |= runtime_peers(eager, nodes, ["x", "w", "b"], compiled)
    return peers

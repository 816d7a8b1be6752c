"""Peers of the activations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from m4ov_bench.peers.base import Compiled, Peer, compiled_peer, runtime_peers


def swiglu(compiled: Compiled = True) -> dict[str, Peer]:
    """Functions of ``(gate, up)``. Hugging Face's Qwen3-VL MLP computes the eager expression."""

    def eager(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    nodes = [
        ("Sigmoid", ["gate"], ["s"], {}),
        ("Mul", ["gate", "s"], ["silu"], {}),
        ("Mul", ["silu", "up"], ["y"], {}),
    ]
    return {
        "eager": eager,
        "torch.compile": compiled_peer(eager, compiled),
        **runtime_peers(eager, nodes, ["gate", "up"], compiled),
    }


def geglu(compiled: Compiled = True) -> dict[str, Peer]:
    """Functions of ``(gate, up)``."""

    def eager(gate: Tensor, up: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh") * up

    return {"eager": eager, "torch.compile": compiled_peer(eager, compiled)}


def gelu(approximate: str, compiled: Compiled = True) -> dict[str, Peer]:
    """Functions of ``(input[, bias])``: the activation of Hugging Face's vision towers after a linear layer, whose
    product holds the bias already where a matrix product adds it."""

    def eager(input: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.gelu(input if bias is None else input + bias, approximate=approximate)

    return {"eager": eager, "torch.compile": compiled_peer(eager, compiled)}

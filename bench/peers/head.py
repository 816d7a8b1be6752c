"""Peers of the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_bench.peers.base import Absent, Compiled, Peer, compiled_peer, runtime_peers, transformers_module


def linear_cross_entropy(rows: int, compiled: Compiled = True, quick: bool = False) -> dict[str, Peer]:
    """Functions of ``(input, linear_weight, target)`` that give the mean loss. ``quick``: leaves the slowest out."""

    def eager(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(input, linear_weight), target)

    peers: dict[str, Peer] = {"eager": eager}
    losses = transformers_module("transformers.loss.loss_utils")
    if isinstance(losses, Absent):
        peers["Hugging Face"] = losses
    else:

        def hugging_face(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
            logits = F.linear(input, linear_weight)
            return losses.ForCausalLMLoss(logits, None, linear_weight.shape[0], shift_labels=target)

        peers["Hugging Face"] = hugging_face
    peers["torch.compile"] = compiled_peer(eager, compiled)
    peers.update(_torch_linear_cross_entropy(rows))

    def inference(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
        log_probabilities = F.log_softmax(F.linear(input, linear_weight).float(), -1)
        return -log_probabilities.gather(1, target[:, None]).mean()

    nodes = [
        ("Transpose", ["weight"], ["transposed"], {"perm": [1, 0]}),
        ("MatMul", ["input", "transposed"], ["logits"], {}),
        ("Cast", ["logits"], ["precise"], {"to": 1}),
        ("LogSoftmax", ["precise"], ["log_probabilities"], {"axis": -1}),
        ("Constant", [], ["last"], {"value_ints": [1]}),
        ("Unsqueeze", ["target", "last"], ["column"], {}),
        ("GatherElements", ["log_probabilities", "column"], ["chosen"], {"axis": 1}),
        ("ReduceMean", ["chosen"], ["mean"], {"keepdims": 0}),
        ("Neg", ["mean"], ["loss"], {}),
    ]
    peers |= runtime_peers(inference, nodes, ["input", "weight", "target"], compiled, scalar=True)
    if quick:
        peers["F.linear_cross_entropy auto"] = Absent("left out of the short run")
    return peers


def _torch_linear_cross_entropy(rows: int) -> dict[str, Peer]:
    """PyTorch's own operator: as it comes, with its automatic chunking, and with the chunking that is fastest here
    (``compact``: the weight's gradient accumulated in the input's dtype)."""
    names = ("F.linear_cross_entropy", "F.linear_cross_entropy auto", "F.linear_cross_entropy compact")
    if not hasattr(F, "linear_cross_entropy"):
        return {name: Absent(f"torch {torch.__version__} has no F.linear_cross_entropy") for name in names}
    options = torch.nn.LinearCrossEntropyOptions
    compact = options(batch_chunk_size=max(1, min(rows, 512)), chunking_method=None, acc_policy="compact")
    choices = (None, options(), compact)

    def bind(choice: Any) -> Callable[..., Tensor]:
        return lambda input, linear_weight, target: F.linear_cross_entropy(input, linear_weight, target, options=choice)

    return {name: bind(choice) for name, choice in zip(names, choices, strict=True)}

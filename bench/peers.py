"""What our operators are compared with, in one place. A peer that cannot run here is an ``Absent`` with the reason."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_bench import runtimes


class Absent(str):
    """Why a peer is not there."""

    __slots__ = ()


Peer = Callable[..., Any] | Absent
Compiled = bool | str  # True: with torch.compile; a text: why not


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
    modeling = _transformers("transformers.models.qwen3_vl.modeling_qwen3_vl")
    if isinstance(modeling, Absent):
        peers["Hugging Face"] = modeling
    else:
        module = modeling.Qwen3VLTextRMSNorm(weight.shape[0], eps)
        del module.weight

        def hugging_face(hidden_states: Tensor, weight: Tensor) -> Tensor:
            module.__dict__["weight"] = weight  # a plain attribute: the weight is this call's argument
            return module(hidden_states)

        peers["Hugging Face"] = with_residual(hugging_face)
    peers["torch.compile"] = _compile(with_residual(eager), compiled)
    if not residual:
        # onnxruntime's fused operator; its RMSNormalization (opset 23) has no bf16 on the CPU.
        nodes = [("SimplifiedLayerNormalization", ["x", "w"], ["y"], {"axis": -1, "epsilon": eps})]
        peers |= _runtimes(eager, nodes, ["x", "w"], compiled)
    return peers


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
        "torch.compile": _compile(eager, compiled),
        **_runtimes(eager, nodes, ["gate", "up"], compiled),
    }


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
    peers["torch.compile"] = _compile(masked, compiled)
    return peers


def linear_cross_entropy(rows: int, compiled: Compiled = True, quick: bool = False) -> dict[str, Peer]:
    """Functions of ``(input, linear_weight, target)`` that give the mean loss. ``quick``: leaves the slowest out."""

    def eager(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(input, linear_weight), target)

    peers: dict[str, Peer] = {"eager": eager}
    losses = _transformers("transformers.loss.loss_utils")
    if isinstance(losses, Absent):
        peers["Hugging Face"] = losses
    else:

        def hugging_face(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
            logits = F.linear(input, linear_weight)
            return losses.ForCausalLMLoss(logits, None, linear_weight.shape[0], shift_labels=target)

        peers["Hugging Face"] = hugging_face
    peers["torch.compile"] = _compile(eager, compiled)
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
    peers |= _runtimes(inference, nodes, ["input", "weight", "target"], compiled, scalar=True)
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


def _runtimes(
    function: Callable[..., Tensor], nodes: list[Any], names: list[str], compiled: Compiled, scalar: bool = False
) -> dict[str, Peer]:
    """Inference runtimes: the function for those that convert PyTorch, the ONNX nodes for the other. The result is
    shaped as the first tensor, or a float32 ``scalar``."""

    def output(first: Tensor, *_: Tensor) -> Tensor:
        return first.new_empty((), dtype=torch.float32) if scalar else torch.empty_like(first)

    if compiled is not True:
        reason = compiled or "not measured in this case"
        return {name: Absent(reason) for name in ("onnxruntime", "OpenVINO", "zentorch")}
    made = {
        "onnxruntime": runtimes.onnxruntime(nodes, names, output),
        "OpenVINO": runtimes.openvino(function, output),
        "zentorch": runtimes.zentorch(function),
    }
    return {name: Absent(peer) if isinstance(peer, str) else peer for name, peer in made.items()}


def _transformers(module: str) -> Any:
    if importlib.util.find_spec("transformers") is None:
        return Absent("transformers is not installed")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return Absent(f"{module} cannot be imported: {error}")


def _compile(function: Callable[..., Any], compiled: Compiled) -> Peer:
    if isinstance(compiled, str):
        return Absent(compiled)
    if not compiled:
        return Absent("not measured in this case")
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        return Absent("torch.compile needs a C++ compiler on the CPU")
    return torch.compile(function, dynamic=False)

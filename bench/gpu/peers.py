"""Libraries of GPU kernels that may be on the machine, as peers. One that is not there is a row that says so."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from m4ov_bench.peers import Absent, Peer

PACKAGES = ("liger_kernel", "quack", "flash_attn", "cut_cross_entropy", "transformer_engine", "verl", "gemlite")
# Peers that have a counterpart of ours and no row beside it yet.
WITHOUT_COUNTERPART = {"gemlite": "its products with quantised weights are not called beside ours yet"}
_HINTS = {"verl": " (its transformers is older than ours: an environment of its own)"}


def rms_norm(eps: float, residual: bool) -> dict[str, Peer]:
    """Functions of ``(hidden_states, weight[, residual])``; with a residual they return (normed, sum)."""
    liger, quack, flash, te = (
        _module("liger_kernel.transformers.functional"),
        _module("quack.rmsnorm"),
        _module("flash_attn.ops.triton.layer_norm"),
        _module("transformer_engine.pytorch"),
    )
    if residual:
        return {
            "Liger": _bind(liger, lambda m: lambda x, w, r: m.liger_fused_add_rms_norm(x, r, w, eps, in_place=False)),
            "quack": _bind(quack, lambda m: lambda x, w, r: m.rmsnorm(x, w, residual=r, eps=eps, prenorm=True)),
            "flash-attn": _bind(
                flash, lambda m: lambda x, w, r: m.rms_norm_fn(x, w, None, residual=r, eps=eps, prenorm=True)
            ),
            "transformer-engine": _bind(te, lambda m: _added(_with_weight(m.RMSNorm, eps))),
        }
    return {
        "Liger": _bind(liger, lambda m: lambda x, w: m.liger_rms_norm(x, w, eps, in_place=False)),
        "quack": _bind(quack, lambda m: lambda x, w: m.rmsnorm(x, w, eps=eps)),
        "flash-attn": _bind(flash, lambda m: lambda x, w: m.rms_norm_fn(x, w, None, eps=eps)),
        "transformer-engine": _bind(te, lambda m: _with_weight(m.RMSNorm, eps)),
    }


def layer_norm(eps: float, residual: bool) -> dict[str, Peer]:
    """Functions of ``(hidden_states, weight, bias[, residual])``; with a residual they return (normed, sum)."""
    liger, flash = _module("liger_kernel.transformers.functional"), _module("flash_attn.ops.triton.layer_norm")
    if residual:
        return {
            "flash-attn": _bind(
                flash, lambda m: lambda x, w, b, r: m.layer_norm_fn(x, w, b, residual=r, eps=eps, prenorm=True)
            )
        }
    return {
        "Liger": _bind(liger, lambda m: lambda x, w, b: m.liger_layer_norm(x, w, b, eps)),
        "flash-attn": _bind(flash, lambda m: lambda x, w, b: m.layer_norm_fn(x, w, b, eps=eps)),
    }


def geglu() -> dict[str, Peer]:
    """Functions of ``(gate, up)``."""
    return {"Liger": _bind(_module("liger_kernel.transformers.functional"), lambda m: m.liger_geglu)}


def _with_weight(module: type[torch.nn.Module], eps: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A norm that exists as a module only, as a function of its weight too. The module finds its gradients by its
    parameters, and so the weight must be one."""
    made: dict[Any, torch.nn.Module] = {}

    def norm(hidden_states: Tensor, weight: Tensor) -> Tensor:
        key = weight.shape, weight.dtype, weight.device
        if key not in made:
            made[key] = module(weight.shape[0], eps=eps, device=weight.device, dtype=weight.dtype)
        if made[key].weight is not weight:
            weight._is_param = True  # type: ignore[attr-defined]  # what isinstance(…, Parameter) asks for
            made[key].weight = weight  # type: ignore[assignment]
        return made[key](hidden_states)

    return norm


def _added(norm: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A norm that has no fused addition, after one."""

    def add_norm(hidden_states: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = hidden_states + residual
        return norm(total, weight), total

    return add_norm


def swiglu() -> dict[str, Peer]:
    """Functions of ``(gate, up)``."""
    liger, flash, te = (
        _module("liger_kernel.transformers.functional"),
        _module("flash_attn.ops.activations"),
        _module("transformer_engine.pytorch.ops"),
    )
    return {
        "Liger": _bind(liger, lambda m: m.liger_swiglu),
        "flash-attn": _bind(flash, lambda m: m.swiglu),
        # It takes both halves as one tensor, the gate first; here they are two.
        "transformer-engine, with cat": _bind(te, lambda m: _of_one_tensor(m.SwiGLU())),
    }


def _of_one_tensor(swiglu: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda gate, up: swiglu(torch.cat((gate, up), dim=-1))


def linear_cross_entropy() -> dict[str, Peer]:
    """Functions of ``(input, linear_weight, target)`` that give the mean loss."""
    liger, quack, cce, verl = (
        _module("liger_kernel.transformers.functional"),
        _module("quack.linear_cross_entropy"),
        _module("cut_cross_entropy"),
        _module("verl.utils.kernel.linear_cross_entropy"),
    )
    return {
        "Liger": _bind(liger, lambda m: m.liger_fused_linear_cross_entropy),
        "quack": _bind(quack, lambda m: lambda x, w, t: m.chunked_linear_cross_entropy(x, w, t)),
        "CCE": _bind(cce, lambda m: m.linear_cross_entropy),
        # Without the filter that drops small gradients, which no other candidate does.
        "CCE, exact": _bind(cce, lambda m: lambda x, w, t: m.linear_cross_entropy(x, w, t, filter_eps=None)),
        "verl": _bind(verl, lambda m: _masked(m.linear_cross_entropy)),
    }


def _masked(linear_cross_entropy: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """verl's gives log-probabilities (and entropies) of all rows, without an ``ignore_index``: its trainer masks
    afterwards. Its arguments: temperature, and how the entropy is reduced."""

    def loss(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
        log_probabilities, _ = linear_cross_entropy(input, linear_weight, target.clamp(min=0), 1.0, "none")
        mask = target >= 0
        return -(log_probabilities * mask).sum() / mask.sum()

    return loss


def _module(name: str) -> Any:
    root = name.split(".")[0]
    if importlib.util.find_spec(root) is None:
        return Absent(f"{root} is not installed{_HINTS.get(root, '')}")
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken peer says so; it does not stop the suite
        return Absent(f"{name} cannot be imported: {type(error).__name__}: {str(error).splitlines()[0][:120]}")


def _bind(module: Any, make: Callable[[Any], Callable[..., Tensor | tuple[Tensor, ...]]]) -> Peer:
    if isinstance(module, Absent):
        return module
    try:
        return make(module)
    except AttributeError as error:
        return Absent(f"another interface than expected: {error}")

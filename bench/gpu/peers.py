"""Libraries of GPU kernels that may be on the machine, as peers. One that is not there is a row that says so."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor

from m4ov_bench.peers import Absent, Peer

PACKAGES = ("liger_kernel", "quack", "flash_attn", "cut_cross_entropy")


def rms_norm(eps: float, residual: bool) -> dict[str, Peer]:
    """Functions of ``(hidden_states, weight[, residual])``; with a residual they return (normed, sum)."""
    liger, quack, flash = (
        _module("liger_kernel.transformers.functional"),
        _module("quack.rmsnorm"),
        _module("flash_attn.ops.triton.layer_norm"),
    )
    if residual:
        return {
            "Liger": _bind(liger, lambda m: lambda x, w, r: m.liger_fused_add_rms_norm(x, r, w, eps, in_place=False)),
            "quack": _bind(quack, lambda m: lambda x, w, r: m.rmsnorm(x, w, residual=r, eps=eps, prenorm=True)),
            "flash-attn": _bind(
                flash, lambda m: lambda x, w, r: m.rms_norm_fn(x, w, None, residual=r, eps=eps, prenorm=True)
            ),
        }
    return {
        "Liger": _bind(liger, lambda m: lambda x, w: m.liger_rms_norm(x, w, eps, in_place=False)),
        "quack": _bind(quack, lambda m: lambda x, w: m.rmsnorm(x, w, eps=eps)),
        "flash-attn": _bind(flash, lambda m: lambda x, w: m.rms_norm_fn(x, w, None, eps=eps)),
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


def swiglu() -> dict[str, Peer]:
    """Functions of ``(gate, up)``."""
    liger, flash = _module("liger_kernel.transformers.functional"), _module("flash_attn.ops.activations")
    return {
        "Liger": _bind(liger, lambda m: m.liger_swiglu),
        "flash-attn": _bind(flash, lambda m: m.swiglu),
    }


def linear_cross_entropy() -> dict[str, Peer]:
    """Functions of ``(input, linear_weight, target)`` that give the mean loss."""
    liger, quack, cce = (
        _module("liger_kernel.transformers.functional"),
        _module("quack.linear_cross_entropy"),
        _module("cut_cross_entropy"),
    )
    return {
        "Liger": _bind(liger, lambda m: m.liger_fused_linear_cross_entropy),
        "quack": _bind(quack, lambda m: lambda x, w, t: m.chunked_linear_cross_entropy(x, w, t)),
        "CCE": _bind(cce, lambda m: m.linear_cross_entropy),
        # Without the filter that drops small gradients, which no other candidate does.
        "CCE, exact": _bind(cce, lambda m: lambda x, w, t: m.linear_cross_entropy(x, w, t, filter_eps=None)),
    }


def _module(name: str) -> Any:
    root = name.split(".")[0]
    if importlib.util.find_spec(root) is None:
        return Absent(f"{root} is not installed")
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

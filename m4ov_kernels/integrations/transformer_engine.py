"""NVIDIA transformer-engine's fp8 linears in training, where that package is installed: one switch on, one off.

Its products of weights that are trained (forward, both gradients, scaling, casting) are the vendor's own; the operators
here are for weights that are frozen. Nothing is imported before :func:`install` is called.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from m4ov_kernels import checks

_OP = "transformer_engine.install"
_PACKAGE = "transformer_engine"
_MULTIPLE = 16  # of both widths, which its fp8 products ask for
KEEP = (r".*lm_head",)


def install(model: nn.Module, *, keep: Sequence[str] = KEEP) -> list[str]:
    """Puts a ``transformer_engine.pytorch.Linear`` in the place of every ``nn.Linear`` of ``model`` that it can serve,
    over the same parameters under the same names: optimizers, checkpoints and sharding see no change. Forward passes
    run inside :func:`autocast`.

    Args:
        model: on a CUDA device.
        keep: regular expressions; a layer whose whole name matches one stays as it is. Layers with a width that is no
            multiple of 16 (3420), and subclasses of ``nn.Linear``, stay too.

    Returns:
        The names of the layers that were replaced.

    Raises:
        RuntimeError: transformer-engine is not installed, cannot be imported, or ``model`` is not on a CUDA device.
    """
    te = _library()
    chosen = eligible(model, keep=keep)
    for name in chosen:
        if model.get_submodule(name).weight.device.type != "cuda":
            checks.refuse(RuntimeError, _OP, "model", "on a CUDA device", f"{name} on another")
    for name in chosen:
        linear = model.get_submodule(name)
        options = {"bias": linear.bias is not None, "params_dtype": linear.weight.dtype, "device": "meta"}
        _swap(model, name, te.Linear(linear.in_features, linear.out_features, **options), linear)
    return chosen


def remove(model: nn.Module) -> list[str]:
    """Puts ``nn.Linear`` back, over the parameters as they are now; returns the names of the layers."""
    te = _library()
    chosen = [name for name, module in model.named_modules() if type(module) is te.Linear]
    for name in chosen:
        old: Any = model.get_submodule(name)
        bias = isinstance(getattr(old, "bias", None), nn.Parameter)
        made = nn.Linear(old.in_features, old.out_features, bias=bias, device="meta", dtype=old.weight.dtype)
        _swap(model, name, made, old)
    return chosen


def autocast(recipe: Any = None) -> AbstractContextManager[Any]:
    """Inside, the installed layers multiply in fp8. ``recipe``: one of ``transformer_engine.common.recipe``; ``None``:
    the library's own choice."""
    te = _library()
    context: AbstractContextManager[Any] = te.fp8_autocast(enabled=True, fp8_recipe=recipe)
    return context


def eligible(model: nn.Module, *, keep: Sequence[str] = KEEP) -> list[str]:
    """The layers that :func:`install` would replace, by name; needs no transformer-engine."""
    kept = [re.compile(pattern) for pattern in keep]
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and name
        and module.in_features % _MULTIPLE == 0
        and module.out_features % _MULTIPLE == 0
        and not any(pattern.fullmatch(name) for pattern in kept)
    ]


def _swap(model: nn.Module, name: str, made: nn.Module, old: nn.Module) -> None:
    for parameter in ("weight", "bias"):
        if isinstance(getattr(old, parameter, None), nn.Parameter):
            setattr(made, parameter, getattr(old, parameter))
    made.train(old.training)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, made)


def unavailable() -> str | None:
    """Why this machine cannot do it; ``None`` if it can."""
    if importlib.util.find_spec(_PACKAGE) is None:
        return (
            "transformer-engine is not installed; its fp8 linears need it and a CUDA device: "
            "pip install --no-build-isolation transformer-engine[pytorch]"
        )
    return None if torch.cuda.is_available() else "transformer-engine's fp8 linears need a CUDA device; there is none"


def _library() -> Any:
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"{_OP}: {reason}")
    try:
        return importlib.import_module(f"{_PACKAGE}.pytorch")
    except Exception as error:
        raise RuntimeError(f"{_OP}: transformer-engine cannot be imported: {error}") from error

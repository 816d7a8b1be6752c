"""Whether a fused operation may take a module's parameters instead of calling it."""

from __future__ import annotations

from torch import nn


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether ``module`` is exactly of one of ``kinds`` (any, if none are given), has its weight itself, and nothing
    happens around its call.

    LoRA gives a layer another class, ``fully_shard`` another class and hooks, and a parametrization makes the weight a
    property: then the module must be called.
    """
    return (not kinds or type(module) in kinds) and module._parameters.get("weight") is not None and is_unhooked(module)


def is_unhooked(module: nn.Module) -> bool:
    """Whether nothing happens around a call of ``module``."""
    return (
        not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in vars(module)
    )

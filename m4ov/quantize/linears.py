"""Which linears a model has, which of them share an input, and what a scale of that input can be folded into."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from m4ov.checkpoints.names import is_router, part_of

# The norm before a block, by the block's name: attribute of its parent.
_NORMS = {
    "self_attn": ("input_layernorm", "layer_norm1"),
    "attn": ("norm1",),
    "mlp": ("post_attention_layernorm", "norm2", "layer_norm2"),
}


@dataclass(frozen=True)
class Fold:
    """What makes a group's input, if that can be divided by a scale for each feature and nothing else hears of it: a
    norm, or a linear with nothing but sums over tokens and products behind it.

    Attributes:
        module: its name.
        first: its first output feature that is part of the input (the values in a fused ``qkv``).
        index: int64 [K], for each input feature the output feature, from ``first``, that it is. One may serve several
            (heads of grouped queries, the patches that a merger puts side by side): those share a scale.
    """

    module: str
    first: int
    index: Tensor

    @property
    def features(self) -> int:
        return int(self.index.max()) + 1


@dataclass(frozen=True)
class Group:
    """Linears that share an input. Engines fuse them, so they are quantised together or not at all.

    Attributes:
        names: of the modules.
        part: one of ``m4ov.checkpoints.PARTS``.
        fold: where a scale of the input can go, or ``None``.
    """

    names: tuple[str, ...]
    part: str
    fold: Fold | None = None


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Every ``nn.Linear``, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def linear(model: nn.Module, name: str) -> nn.Linear:
    """The linear of that name."""
    found = model.get_submodule(name)
    assert isinstance(found, nn.Linear), name
    return found


def find(model: nn.Module) -> list[Group]:
    """All linears but routers, in the model's order; each in one group. A linear that is not recognised is a group of
    its own with nothing to fold into."""
    modules = dict(model.named_modules())
    known: dict[str, Group] = {}
    for name, module in modules.items():
        for names, fold in _recognised(name, module, modules):
            full = tuple(f"{name}.{child}" for child in names)
            known |= dict.fromkeys(full, Group(full, part_of(full[0]), fold))
    every = [name for name in linears_of(model) if not is_router(name)]
    return list(dict.fromkeys(known.get(name) or Group((name,), part_of(name)) for name in every))


def _recognised(name: str, module: Any, modules: dict[str, nn.Module]) -> Iterator[tuple[tuple[str, ...], Fold | None]]:
    def has(*children: str) -> bool:
        return all(isinstance(getattr(module, child, None), nn.Linear) for child in children)

    above, _, own = name.rpartition(".")
    norm = next((f"{above}.{n}" for n in _NORMS.get(own, ()) if hasattr(modules.get(above), n)), None)

    def after_norm(linear: Any, norm: str | None) -> Fold | None:
        weight = getattr(modules.get(norm or ""), "weight", None)
        if norm is None or weight is None or linear.in_features % weight.shape[0]:
            return None
        return Fold(norm, 0, torch.arange(linear.in_features) % weight.shape[0])

    if has("q_proj", "k_proj", "v_proj"):
        yield ("q_proj", "k_proj", "v_proj"), after_norm(module.q_proj, norm)
        for out in ("o_proj", "out_proj"):
            if has(out):
                yield (out,), _values(f"{name}.v_proj", 0, getattr(module, out), module.v_proj.out_features, module)
    elif has("qkv", "proj"):
        yield ("qkv",), after_norm(module.qkv, norm)
        width = module.qkv.out_features // 3
        yield ("proj",), _values(f"{name}.qkv", 2 * width, module.proj, width, module)
    elif has("gate_proj", "up_proj", "down_proj"):
        yield ("gate_proj", "up_proj"), after_norm(module.gate_proj, norm)
        yield ("down_proj",), Fold(f"{name}.up_proj", 0, torch.arange(module.down_proj.in_features))
    elif has("linear_fc1", "linear_fc2"):  # behind a GELU nothing can be folded
        yield ("linear_fc1",), after_norm(module.linear_fc1, f"{name}.norm" if hasattr(module, "norm") else norm)
        yield ("linear_fc2",), None
    elif has("fc1", "fc2"):
        yield ("fc1",), after_norm(module.fc1, norm)
        yield ("fc2",), None
    elif hasattr(module, "ln_q") and isinstance(getattr(module, "mlp", None), nn.Sequential):
        yield ("mlp.0",), after_norm(module.mlp[0], f"{name}.ln_q")


def _values(linear: str, first: int, out: nn.Linear, width: int, attention: Any) -> Fold | None:
    """Attention's output is a sum of values: feature d of head h is feature d of the values of h's group."""
    head_dim = attention.head_dim
    heads, shared = out.in_features // head_dim, width // head_dim
    if out.in_features % head_dim or width % head_dim or heads % shared:
        return None
    place = torch.arange(out.in_features)
    return Fold(linear, first, place // head_dim // (heads // shared) * head_dim + place % head_dim)

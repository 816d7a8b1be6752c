"""ModelOpt's ``pre_quant_scale``, by which the *input* of a weight is multiplied, put into what makes that input, so
that servers which know of no such scale compute the same.

Two places take it. A norm, if everything that reads its output has one scale: its weight (and bias) times the scale.
The linear before, if nothing but sums over tokens and products by other things stand between (values before
``o_proj``, ``up`` before ``down``): its output rows times the scale; if it is quantised itself, its scales times that,
and its codes stay. Each product is rounded once, in the dtype of what is multiplied: folding is not bit-exact, and the
largest relative error is said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from m4ov.checkpoints.folder import Checkpoint, Weight
from m4ov.models.sharded import WeightsError
from m4ov_kernels.gemm.weights import Fp8Weight
from m4ov_kernels.gemm.weights.bits import same

# Under one parent: modules that share an input → the norm that makes it, two levels up.
_AFTER_NORM = {
    ("self_attn", ("q_proj", "k_proj", "v_proj")): "input_layernorm",
    ("mlp", ("gate_proj", "up_proj")): "post_attention_layernorm",
    ("attn", ("qkv",)): "norm1",
    ("mlp", ("linear_fc1",)): "norm2",
}
_AFTER_LINEAR = {"o_proj": "v_proj", "down_proj": "up_proj"}
_SHIFTED = ("gemma",)  # norms that multiply by 1 + weight


@dataclass
class Folding:
    """Attributes:
    tensors: full name of a tensor of a norm, or of a linear's bias → the factor of its elements.
    rows: module → the factor of its output features [N].
    folded: modules whose pre_quant_scale is in one of these.
    stuck: module that keeps its own → why.
    rounding: what was folded into → the largest relative error of a rounded product; filled in as they are made.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    folded: set[str] = field(default_factory=set)
    stuck: dict[str, str] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)

    def tensor(self, name: str, value: Tensor) -> Tensor:
        """A tensor that is not quantised, folded; any tensor of the checkpoint may come."""
        module, _, leaf = name.rpartition(".")
        factor = self.tensors.get(name)
        if factor is None and leaf == "weight" and module in self.rows:
            factor = self.rows[module][:, None]
        return value if factor is None else self._times(name, value, factor)

    def weight(self, module: str, weight: Weight) -> Weight:
        """A quantised weight with its own scale taken out, if that is folded, and its rows multiplied."""
        changes: dict[str, Any] = {"pre_quant_scale": None} if module in self.folded else {}
        if module in self.rows:
            changes["scales"] = self._times(module, weight.scales, self.rows[module][:, None])
        return replace(weight, **changes) if changes else weight

    def _times(self, name: str, value: Tensor, factor: Tensor) -> Tensor:
        exact = value.double() * factor.double()
        made = exact.to(value.dtype)
        if not bool(torch.isfinite(made).all()):
            kind = str(value.dtype).removeprefix("torch.")
            raise WeightsError(f"{name}: times its pre_quant_scale it is past the end of {kind}")
        off = ((made.double() - exact).abs() / exact.abs().clamp_min(torch.finfo(torch.float64).tiny)).max()
        self.rounding[name] = max(self.rounding.get(name, 0.0), float(off))
        return made


def plan(checkpoint: Checkpoint) -> Folding:
    """Where each ``pre_quant_scale`` of a checkpoint can go; these alone are read."""
    found = Folding()
    scales: dict[str, Tensor] = {}
    for module, tensors in checkpoint.modules.items():
        stored = tensors.get(f"{module}.pre_quant_scale")
        if stored is not None:
            scales[module] = stored.read().clone()
    text = checkpoint.config.get("text_config")
    kind = str((text if isinstance(text, dict) else checkpoint.config).get("model_type", ""))
    for module in scales:
        if module in found.folded or module in found.stuck:
            continue
        reason = "its norm multiplies by 1 + weight" if kind.startswith(_SHIFTED) else None
        reason = reason or _fold(checkpoint, module, scales, found)
        if reason is not None:
            found.stuck[module] = reason
    return found


def _fold(checkpoint: Checkpoint, module: str, scales: dict[str, Tensor], found: Folding) -> str | None:
    parent, _, own = module.rpartition(".")
    above, _, block = parent.rpartition(".")
    for (place, children), norm in _AFTER_NORM.items():
        if block == place and own in children:
            return _into_norm(checkpoint, f"{above}.{norm}", [f"{parent}.{child}" for child in children], scales, found)
    if own in _AFTER_LINEAR:
        return _into_linear(checkpoint, f"{parent}.{_AFTER_LINEAR[own]}", module, scales[module], found)
    return "nothing is known before it that could take its pre_quant_scale"


def _into_norm(
    checkpoint: Checkpoint, norm: str, readers: list[str], scales: dict[str, Tensor], found: Folding
) -> str | None:
    first = scales.get(readers[0])
    for reader in readers:
        if reader not in scales:
            return f"{reader} reads the same input and has no pre_quant_scale"
        if first is None or not same(scales[reader], first):
            return f"{reader} reads the same input and has another pre_quant_scale than {readers[0]}"
    names = [f"{norm}.{leaf}" for leaf in ("weight", "bias") if f"{norm}.{leaf}" in checkpoint.plain]
    if not names or names[0] != f"{norm}.weight" or first is None:
        return f"there is no {norm}.weight to fold its pre_quant_scale into"
    shape = checkpoint.plain[names[0]].shape
    if shape != tuple(first.shape):
        return f"{norm}.weight is {list(shape)}, and the pre_quant_scale {list(first.shape)}"
    found.tensors |= dict.fromkeys(names, first)
    found.folded |= set(readers)
    return None


def _into_linear(checkpoint: Checkpoint, before: str, module: str, scale: Tensor, found: Folding) -> str | None:
    if before in checkpoint.modules:
        weight = checkpoint.read(before)
        if isinstance(weight, Fp8Weight) and weight.granularity != "channel":
            return f"{before} has no scale for each output"
        N = weight.shape[0]
    elif before in checkpoint.linears:
        N = checkpoint.linears[before][0]
    else:
        return f"there is no {before} to fold its pre_quant_scale into"
    factor = scale
    if scale.shape[0] != N:  # grouped queries: a value serves several heads
        head_dim = _head_dim(checkpoint)
        if not head_dim or N % head_dim or scale.shape[0] % N:
            return f"{before} has {N} outputs, and the pre_quant_scale {scale.shape[0]} features"
        heads = scale.view(N // head_dim, -1, head_dim)
        if not bool((heads == heads[:, :1]).all()):
            return f"heads that share values of {before} have different pre_quant_scale"
        factor = heads[:, 0].flatten()
    found.rows[before] = factor
    bias = f"{before}.bias"
    if bias in checkpoint.plain:
        found.tensors[bias] = factor
    found.folded.add(module)
    return None


def _head_dim(checkpoint: Checkpoint) -> int:
    text = checkpoint.config.get("text_config")
    config = text if isinstance(text, dict) else checkpoint.config
    given: Callable[[str], Any] = config.get
    if given("head_dim"):
        return int(given("head_dim"))
    width, heads = given("hidden_size"), given("num_attention_heads")
    return int(width) // int(heads) if width and heads else 0

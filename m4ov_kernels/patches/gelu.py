"""Fronts of transformers' modules with a GELU between two linear layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from m4ov_kernels.nn import linear_gelu


class SiglipMLP:
    """Front of SigLIP's MLP."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        mlp: Any = self
        return mlp.fc2(linear_gelu(mlp.fc1, hidden_states, "tanh"))


class Qwen2_5PatchMerger:  # noqa: N801
    """Front of Qwen2.5-VL's merger."""

    def forward(self, x: Tensor) -> Tensor:
        merger: Any = self
        first, _, last = merger.mlp
        return last(linear_gelu(first, merger.ln_q(x).view(-1, merger.hidden_size), "none"))


class Projector:
    """Front of LLaVA's projector."""

    def forward(self, image_features: Tensor) -> Tensor:
        projector: Any = self
        return projector.linear_2(linear_gelu(projector.linear_1, image_features, "none"))


def not_gelu_tanh(module: Any) -> str | None:
    """For an MLP."""
    return _other(getattr(module, "act_fn", None) or module.activation_fn, ("GELUTanh",), "tanh")


def not_gelu(module: Any) -> str | None:
    """For a merger or projector."""
    activation = module.mlp[1] if hasattr(module, "mlp") else getattr(module, "act_fn", None) or module.act
    return _other(activation, ("GELUActivation",), "none")


def _other(activation: Any, names: tuple[str, ...], approximate: str) -> str | None:
    if type(activation) is nn.GELU and activation.approximate == approximate:
        return None
    if type(activation).__name__ in names:
        return None
    return f"its activation is {type(activation).__name__}, not gelu with approximate={approximate!r}"

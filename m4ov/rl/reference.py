"""The policy that the trained one is held to: none, as it began, an average of its weights, or without its adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.rl.responses import response_logprob
from m4ov.rl_recipe import ReferenceConfig
from m4ov_kernels.packing import PackedBatch

_PREFIX = "reference."


class Reference:
    """A reference policy.

    ``"frozen"`` and ``"ema"`` hold a second model; the average is of float32 weights, a₀ = w₀, aₙ = decay · aₙ₋₁ +
    (1 − decay) · wₙ, and is in the checkpoints of a callback that passes :meth:`tensors` on. ``"lora-off"`` is the
    trained model with its adapters (PEFT's) switched off: no second model.

    Args:
        model: that is trained, as it begins.

    Raises:
        ValueError: "lora-off", and the model has no adapters; or a second model of one that is sharded over ranks.
    """

    def __init__(self, config: ReferenceConfig, model: Qwen3VL) -> None:
        self.config = config
        self.model: Qwen3VL | None = None
        self.averages: dict[str, Tensor] = {}
        self._weights: Mapping[str, Tensor] = {}
        if config.kind == "lora-off" and not _adapters(model):
            raise ValueError("reference.kind: lora-off needs a model with adapters; this one has none")
        if config.kind in ("frozen", "ema"):
            sharded = next((name for name, weight in model.named_parameters() if isinstance(weight, DTensor)), None)
            if sharded is not None:
                raise ValueError(f"reference.kind: {config.kind} needs whole weights; {sharded} is sharded over ranks")
            self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @property
    def present(self) -> bool:
        return self.config.kind != "none"

    @contextmanager
    def policy(self, model: Qwen3VL) -> Iterator[Qwen3VL]:
        """The reference, in evaluation mode and without gradients; ``model``: that is trained, back in its mode after.

        Raises:
            ValueError: there is no reference.
        """
        if not self.present:
            raise ValueError("reference.kind: expected another than none, where a reference is asked for")
        if self.model is not None:
            with torch.no_grad():
                yield self.model
            return
        was_training, adapters = model.training, _adapters(model)
        enabled = [not adapter.disable_adapters for adapter in adapters]
        trained = [parameter.requires_grad for parameter in model.parameters()]
        model.eval()
        for adapter in adapters:
            adapter.enable_adapters(False)
        try:
            with torch.no_grad():
                yield model
        finally:
            for adapter, on in zip(adapters, enabled, strict=True):
                adapter.enable_adapters(on)
            # PEFT's switch decides anew which of an adapter's weights require gradients.
            for parameter, on in zip(model.parameters(), trained, strict=True):
                parameter.requires_grad_(on)
            model.train(was_training)

    def logprob(self, model: Qwen3VL, batch: PackedBatch, *, temperature: float = 1.0) -> Tensor:
        """Of a batch's responses under the reference, ``[R]``, detached."""
        with self.policy(model) as reference:
            return response_logprob(reference, batch, temperature=temperature)

    def tensors(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Given the float32 weights that are trained, by name, changed in place from then on: the averages, for
        checkpoints; empty without."""
        if self.config.kind != "ema":
            return {}
        self._weights = weights
        self.averages = {name: weight.detach().clone() for name, weight in weights.items()}
        return {f"{_PREFIX}{name}": average for name, average in self.averages.items()}

    @torch.no_grad()
    def begin(self, resumed: bool) -> None:
        """Before the first step: the averages are the weights, or (``resumed``) what a checkpoint held."""
        if not resumed:
            for name, average in self.averages.items():
                average.copy_(self._weights[name])
        self._publish()

    @torch.no_grad()
    def after_step(self) -> None:
        """The weights have moved on."""
        if self.averages:
            averages = list(self.averages.values())
            torch._foreach_lerp_(averages, [self._weights[name] for name in self.averages], 1.0 - self.config.decay)
            self._publish()

    def _publish(self) -> None:
        if self.model is not None and self.averages:
            parameters = dict(self.model.named_parameters())
            for name, average in self.averages.items():
                parameters[name].copy_(average)


def _adapters(model: nn.Module) -> list[Any]:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return []
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

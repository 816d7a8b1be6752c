"""The average of float32 weights along a training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from m4ov.manifest import AverageConfig
from m4ov.train.muon import local

_PREFIX = "average."


class Average:
    """Of the weights after each step.

    ``"ema"``: a₀ = w₀, aₙ = decay · aₙ₋₁ + (1 − decay) · wₙ, over the stage. ``"tail"``: the mean of the weights after
    the steps of the round that runs.

    Args:
        weights: that are trained, float32, by name; changed by the optimizer in place.
        round_steps: of a round.
    """

    def __init__(self, config: AverageConfig, weights: Mapping[str, Tensor], round_steps: int) -> None:
        self.config, self.round_steps = config, round_steps
        self.averages = {name: weight.detach().clone() for name, weight in weights.items()}
        self._averages = [local(average) for average in self.averages.values()]
        self._weights = [local(weight) for weight in weights.values()]

    def tensors(self) -> dict[str, Tensor]:
        """For checkpoints."""
        return {f"{_PREFIX}{name}": average for name, average in self.averages.items()}

    @torch.no_grad()
    def begin(self) -> None:
        """The weights are those before the first step."""
        torch._foreach_copy_(self._averages, self._weights)

    @torch.no_grad()
    def after_step(self, done: int) -> None:
        """The weights are those after ``done`` steps."""
        place = (done - 1) % self.round_steps + 1  # in its round
        if self.config.kind == "tail" and place == 1:
            self.begin()
            return
        rate = 1.0 - self.config.decay if self.config.kind == "ema" else 1.0 / place
        torch._foreach_lerp_(self._averages, self._weights, rate)

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """The model with the averages as its weights, and then with its own again, to the bit."""
        parameters = dict(model.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in self.averages}
        with torch.no_grad():
            for name, average in self.averages.items():
                parameters[name].copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    parameters[name].copy_(value)

"""A task small enough for tests: real images and questions, a model of a few thousand weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from rich.console import Console

from m4ov import sft
from m4ov.recipe import ModelConfig, QuickstartConfig, TextConfig, VisionConfig


def tiny_config(folder: Path | str = "", **train: object) -> QuickstartConfig:
    """A run of a few steps of a few samples."""
    config = QuickstartConfig(
        model=ModelConfig(
            vision=VisionConfig(hidden_size=32, intermediate_size=64, layers=2, heads=2, deepstack_layers=[0]),
            text=TextConfig(hidden_size=32, intermediate_size=64, layers=2, heads=4, key_value_heads=2, head_dim=16),
            initializer_range=0.2,  # so that tokens and images matter from the start
        )
    )
    config.run.folder = str(folder)
    config.run.threads = 1
    config.data.images_per_step, config.data.digits_per_step, config.data.questions_per_image = 3, 2, 2
    config.train.steps, config.train.checkpoint_seconds, config.train.log_every = 6, 0.0, 1
    for name, value in train.items():
        setattr(config.train, name, value)
    return config


@cache
def tiny_task(precision: str = "fp32") -> sft.Task:
    """The data of :func:`tiny_config`; read once."""
    return sft.prepare(tiny_config(precision=precision), quiet())


def quiet() -> Console:
    """A console that says nothing."""
    return Console(quiet=True)


def mixture_batch(step: int, precision: str = "fp32", **numbers: int):
    """A training batch."""
    return tiny_task(precision).mixture(tiny_config().data, 0, **numbers).batch(step)


def equal_states(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two states have the same names and the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

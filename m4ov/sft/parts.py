"""The parts of a Qwen3-VL, and what is frozen of them."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

_PREFIXES = {
    "model.visual.merger.": "merger",
    "model.visual.deepstack_merger_list.": "merger",
    "model.visual.": "vision",
    "model.language_model.embed_tokens.": "embeddings",
    "lm_head.": "embeddings",
    "model.language_model.": "language",
}


def part_of(name: str) -> str:
    """Which of :data:`m4ov.manifest.PARTS` a parameter or module belongs to.

    Raises:
        ValueError: to none.
    """
    for prefix, part in _PREFIXES.items():
        if f"{name}.".startswith(prefix):
            return part
    raise ValueError(f"{name} belongs to no part of a Qwen3-VL")


def freeze(model: nn.Module, parts: Collection[str]) -> None:
    """Parameters of these parts get no gradients, all others do."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in parts)

"""Calibration by hooks: the model runs as it is, vision tower included, and what enters each linear is sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from m4ov.models.qwen3_vl import forward
from m4ov.quantize.linears import Group
from m4ov_kernels.packing import PackedBatch

#: A batch: packed rows of Qwen3-VL, or the keyword arguments of any model's forward.
Batch = PackedBatch | Mapping[str, Any]
ROWS = 512  # sampled of each group's input


@dataclass
class Inputs:
    """What entered a group of linears.

    Attributes:
        rows: [R, K], evenly spaced over all that came.
        mean: float32 [K], the mean magnitude of each feature over all that came.
        count: of all rows.
    """

    rows: Tensor
    mean: Tensor
    count: int


@dataclass
class _Seen:
    share: int
    rows: list[Tensor] = field(default_factory=list)
    total: Tensor | None = None
    count: int = 0

    def add(self, value: Tensor) -> None:
        flat = value.detach().flatten(0, -2)
        if not len(flat):
            return
        total = flat.float().abs().sum(0)
        self.total = total if self.total is None else self.total + total
        self.count += len(flat)
        places = torch.linspace(0, len(flat) - 1, min(self.share, len(flat)), device=flat.device).round().long()
        self.rows.append(flat[places])


def run(model: nn.Module, batch: Batch) -> Any:
    """The model's output on a batch, with its loss if the batch has labels."""
    return forward(model, batch) if isinstance(batch, PackedBatch) else model(**batch)


@torch.no_grad()
def collect(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    *,
    rows: int = ROWS,
    advance: Callable[[], object] = lambda: None,
) -> dict[Group, Inputs]:
    """Run the model once over the batches and sample the input of each group.

    Raises:
        ValueError: nothing came to a group: the batches have no image, say, and the vision tower is to be quantised.
    """
    modules = dict(model.named_modules())
    seen = {group: _Seen(-(-rows // max(len(batches), 1))) for group in groups}
    hooks = [
        modules[group.names[0]].register_forward_pre_hook(lambda _, arguments, at=at: at.add(arguments[0]))
        for group, at in seen.items()
    ]
    try:
        for batch in batches:
            run(model, batch)
            advance()
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for group, at in seen.items():
        if at.total is None:
            raise ValueError(
                f"--calibrate: expected data that reaches every linear that is quantised; nothing came to "
                f"{group.names[0]} in {len(batches)} batches"
            )
        found[group] = Inputs(torch.cat(at.rows), at.total / at.count, at.count)
    return found

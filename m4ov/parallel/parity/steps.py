"""What a model does in a few steps, whole tensors of it; and how far two such records are apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.parallel import data
from m4ov.parallel.mesh import Mesh
from m4ov_kernels.packing import PackedBatch

STEPS, LEARNING_RATE, MOMENTUM = 3, 0.02, 0.9
# Gradients that are zero but for rounding are far below this; AdamW would make ±lr of them.
ADAMW: dict[str, Any] = {"lr": 1e-3, "eps": 1e-4, "weight_decay": 0.01}


@dataclass
class Record:
    """Float32, whole tensors by parameter name.

    Attributes:
        loss, norm: of the first step.
        grads: of the first step.
        sgd, adamw: the weights after three steps.
    """

    loss: float
    norm: float
    grads: dict[str, Tensor]
    sgd: dict[str, Tensor] = field(default_factory=dict)
    adamw: dict[str, Tensor] = field(default_factory=dict)


def record(build: Callable[[], Qwen3VL], batch: PackedBatch, mesh: Mesh | None, *, steps: int = STEPS) -> Record:
    """Of a model that ``build`` makes anew, trained on one batch (the share of this rank)."""
    model = build()
    loss, norm = backward(model, batch, mesh)
    made = Record(loss, norm, {name: whole(parameter.grad) for name, parameter in model.named_parameters()})
    if steps:
        made.sgd = _train(model, torch.optim.SGD, steps, batch, mesh, lr=LEARNING_RATE, momentum=MOMENTUM)
        made.adamw = _train(build(), torch.optim.AdamW, steps, batch, mesh, **ADAMW)
    return made


def backward(model: Qwen3VL, batch: PackedBatch, mesh: Mesh | None) -> tuple[float, float]:
    """Leaves the gradients of the mean over the labels of all ranks; returns its value and their norm."""
    model.zero_grad()
    found = model.loss(batch)
    if mesh is None:
        mean = found.total / max(found.num_labels, 1)
    else:
        mean = data.token_mean(found.total, found.num_labels, mesh)
    mean.backward()
    loss = mean.detach().double()
    if mesh is not None:
        loss = mesh.all_reduce(loss, data.AXES)
    return float(loss), float(data.grad_norm(model.parameters()))


def _train(
    model: Qwen3VL, kind: Any, steps: int, batch: PackedBatch, mesh: Mesh | None, **options: Any
) -> dict[str, Tensor]:
    optimizer = kind(model.parameters(), foreach=False, **options)
    for _ in range(steps):
        backward(model, batch, mesh)
        optimizer.step()
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def whole(tensor: Tensor | nn.Parameter | None) -> Tensor:
    """Collective, if it is distributed."""
    assert tensor is not None, "a parameter has no gradient"
    return (tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()).clone()


def relative(found: Tensor, wanted: Tensor) -> float:
    """‖found - wanted‖ / ‖wanted‖; what must be zero has to be zero."""
    if found.shape != wanted.shape:
        return float("inf")
    difference = float((found.double() - wanted.double()).norm())
    return difference / float(wanted.double().norm()) if difference else 0.0


@dataclass(frozen=True)
class Difference:
    """The largest relative difference, and of which tensor; ``adamw``: the largest difference over the learning rate."""

    loss: float
    norm: float
    grad: float
    grad_of: str
    sgd: float
    sgd_of: str
    adamw: float
    adamw_of: str

    @property
    def largest(self) -> float:
        return max(self.loss, self.norm, self.grad, self.sgd)


def compare(found: Record, wanted: Record) -> Difference:
    """Every tensor of two records.

    Raises:
        KeyError: they are not of the same parameters.
    """
    if found.grads.keys() != wanted.grads.keys():
        raise KeyError(f"other parameters: {sorted(found.grads.keys() ^ wanted.grads.keys())}")

    def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, str]:
        return max(((_nan_is_far(relative(a[name], b[name])), name) for name in b), default=(0.0, ""))

    rate = ADAMW["lr"]
    moved = [(_nan_is_far(float((found.adamw[n] - t).abs().max()) / rate), n) for n, t in wanted.adamw.items()]
    return Difference(
        _nan_is_far(abs(found.loss - wanted.loss) / abs(wanted.loss)),
        _nan_is_far(abs(found.norm - wanted.norm) / abs(wanted.norm)),
        *worst(found.grads, wanted.grads),
        *worst(found.sgd, wanted.sgd),
        *max(moved, default=(0.0, "")),
    )


def _nan_is_far(value: float) -> float:
    return value if value == value else float("inf")


def alike_on_all_ranks(values: list[float]) -> bool:
    """Whether every rank has the same bits."""
    own = torch.tensor(values, dtype=torch.float64)
    both = torch.stack([own, -own])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return bool((both[0] == -both[1]).all())

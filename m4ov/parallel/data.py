"""Data parallelism: weights, gradients and optimiser states sharded over ranks that each have samples of their own.

FSDP2 shards every block for itself; with ``dp_replicate`` above 1 there are as many replicas (HSDP). Gradients are
summed over the ranks, never averaged: the loss of a rank is its sum over tokens, divided by the labels of *all* ranks
(:func:`token_mean`), so that a step does not depend on how samples were dealt out.

The vision tower and whole experts are sharded over more ranks than the layers are: over all that have other images or
tokens, which includes those of the tensor and context axes (:attr:`m4ov.parallel.mesh.Mesh.fold_mesh`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.parallel.mesh import Mesh
from m4ov_kernels.packing import PackedBatch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AXES = ("dp_replicate", "dp_shard")


@dataclass(frozen=True)
class DataParallel:
    """How the sharded weights are used.

    Attributes:
        param_dtype: in which forward and backward compute; ``None``: that of the weights.
        reduce_dtype: in which gradients are summed over the ranks; ``None``: that of the gradients.
        reshard_after_forward: free a block's weights after its forward, and gather them again for its backward.
    """

    param_dtype: str | None = None
    reduce_dtype: str | None = None
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        for name in ("param_dtype", "reduce_dtype"):
            value = getattr(self, name)
            if value is not None and value not in _DTYPES:
                raise ValueError(f"data parallel: {name} must be one of {', '.join(_DTYPES)} or None; got {value!r}")

    @property
    def policy(self) -> MixedPrecisionPolicy:
        param, reduce = (None if name is None else _DTYPES[name] for name in (self.param_dtype, self.reduce_dtype))
        return MixedPrecisionPolicy(param_dtype=param, reduce_dtype=reduce, cast_forward_inputs=False)


def shard(model: Qwen3VL, mesh: Mesh, config: DataParallel | None = None) -> Qwen3VL:
    """Shard a model in place, after :func:`m4ov.parallel.tensor.split` and :func:`m4ov.parallel.expert.spread`.

    The model may be on meta. From here on every rank must call it on every step, whatever its batch holds: the vision
    tower of a rank that has no image runs on zeros without effect, because the others wait for it in its collectives.
    """
    config = config or DataParallel()
    units: list[tuple[nn.Module, Any]] = [(block, mesh.fold_mesh) for block in model.model.visual.blocks]
    units.append((model.model.visual, mesh.fold_mesh))
    layer: Any
    for layer in model.model.language_model.layers:
        if layer.sparse:
            units.append((layer.mlp.experts, mesh.expert_mesh))
        units.append((layer, mesh.data_mesh))
    for module, group in units:
        fully_shard(
            module,
            mesh=group,
            reshard_after_forward=config.reshard_after_forward,
            mp_policy=config.policy,
            shard_placement_fn=_free_dimension(group.size(-1)),
        )
    # The head is called after the model's forward; the root's weights stay until the backward ends.
    fully_shard(
        model, mesh=mesh.data_mesh, mp_policy=config.policy, shard_placement_fn=_free_dimension(mesh.data_mesh.size(-1))
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum that multiplies, and 1 needs none
    model.always_vision = model.always_vision or mesh.layout.world > 1
    return model


def _free_dimension(size: int) -> Any:
    """Where FSDP cuts a weight: along its first dimension, or along another if that is cut by another axis."""

    def place(parameter: nn.Parameter) -> Shard | None:
        if not isinstance(parameter, DTensor) or not any(
            isinstance(found, Shard) and found.dim == 0 for found in parameter.placements
        ):
            return None
        local = parameter.to_local().shape
        return next((Shard(dim) for dim in range(1, len(local)) if local[dim] % size == 0), None)

    return place


def token_mean(total: Tensor, num_labels: int | Tensor, mesh: Mesh, axes: Iterable[str] = AXES) -> Tensor:
    """This rank's part of the mean loss over the labels of all ranks: their sum is the loss, and the sum of their
    gradients its gradient.

    Args:
        total: sum of this rank's losses.
        num_labels: how many they are.
    """
    return total / global_count(num_labels, total, mesh, axes)


def global_count(count: int | Tensor, like: Tensor, mesh: Mesh, axes: Iterable[str] = AXES) -> Tensor:
    """The sum over ranks, int64, on the device of ``like``; at least 1."""
    counted = torch.as_tensor(count, dtype=torch.int64).to(like.device).clone()
    return mesh.all_reduce(counted, tuple(axes)).clamp_min(1)


def imbalance(batch: PackedBatch, mesh: Mesh) -> dict[str, float]:
    """How unevenly the ranks are loaded: the most tokens (patches) of a rank over the mean of all; 1 is even.

    Every rank of the data axes waits for the one that has most, so this is the factor that a step loses. 0: nobody
    has any.
    """
    vision = [part for part in (batch.images, batch.videos) if part is not None]
    own = [float(batch.tokens), float(sum(part.pixel_values.shape[0] for part in vision))]
    total = mesh.all_reduce(torch.tensor(own, device=batch.input_ids.device), AXES)
    most = torch.tensor(own, device=batch.input_ids.device)
    for axis in AXES:
        group = mesh.group(axis)
        if group is not None:
            dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    mean = total / mesh.layout.data
    ratio = torch.where(mean > 0, most / mean.clamp_min(1e-30), 0.0).tolist()
    return {"tokens": ratio[0], "patches": ratio[1]}


def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients together, of any placements, the same bits on every rank; a scalar, summed in float64,
    returned in float32 (float64 for float64 gradients).

    Raises:
        ValueError: a gradient has yet to be summed over an axis.
    """
    sums: dict[tuple[str, ...], list[Tensor]] = {}
    groups: dict[str, Any] = {}
    dtype = torch.float32
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        over: list[str] = []
        if isinstance(grad, DTensor):
            for axis, placement in enumerate(grad.placements):
                if placement.is_partial():
                    raise ValueError(f"grad_norm: a gradient {list(grad.shape)} is not summed: {grad.placements}")
                if placement.is_replicate() or grad.device_mesh.size(axis) == 1:
                    continue
                name = (grad.device_mesh.mesh_dim_names or ())[axis]
                groups[name] = grad.device_mesh.get_group(axis)
                over.append(name)
            grad = grad.to_local()
        dtype = torch.promote_types(dtype, grad.dtype)
        sums.setdefault(tuple(over), []).append(grad.to(dtype).square().sum(dtype=torch.float64))
    total = torch.zeros((), dtype=torch.float64)
    for names in sorted(sums):  # by axis: every rank in the same order, which their groups' names are not
        part = torch.stack(sums[names]).sum()
        for name in names:
            dist.all_reduce(part, group=groups[name])
        total = total.to(part.device) + part
    return total.sqrt().to(dtype)


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that :func:`grad_norm` is at most ``max_norm``; returns what it was."""
    kept = [parameter for parameter in parameters if parameter.grad is not None]
    norm = grad_norm(kept)
    factor = (max_norm / (norm + 1e-6)).clamp_max(1.0)
    for parameter in kept:
        grad = parameter.grad
        assert grad is not None
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        local.mul_(factor.to(local.device))
    return norm

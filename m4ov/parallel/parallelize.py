"""A model on a mesh: expert and tensor parallelism first, then FSDP around them; and its weights from files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from m4ov.models.qwen3_vl import Qwen3VL, read
from m4ov.parallel import data, expert, tensor
from m4ov.parallel.data import DataParallel
from m4ov.parallel.expert import ExpertParallel
from m4ov.parallel.mesh import LayoutError, Mesh, ModelSizes, check
from m4ov.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class Parallel:
    """What each kind needs to know; :class:`m4ov.parallel.mesh.Layout` says how many ranks it has."""

    data: DataParallel = field(default_factory=DataParallel)
    tensor: TensorParallel = field(default_factory=TensorParallel)
    expert: ExpertParallel = field(default_factory=ExpertParallel)


def parallelize(model: Qwen3VL, mesh: Mesh, config: Parallel | None = None) -> Qwen3VL:
    """Put a model on a mesh, in place; it holds the same weights on every rank, or none (meta).

    Raises:
        LayoutError: the layout does not fit the model, or has pipeline or context ranks, which are not built yet.
    """
    config, layout = config or Parallel(), mesh.layout
    check(layout, layout.world, ModelSizes.of(model.config))
    for axis in ("pp", "cp"):
        if getattr(layout, axis) > 1:
            raise LayoutError(f"layout {layout}: {axis} {getattr(layout, axis)}: this axis is not built yet")
    expert.spread(model, mesh)
    tensor.split(model, mesh, config.tensor)
    return data.shard(model, mesh, config.data)


def load(model: Qwen3VL, folder: Path | str) -> None:
    """Fill a model on a mesh (built on meta, put on the mesh, ``to_empty``) from a folder as Hugging Face writes it.
    Every rank reads every tensor, one at a time, and keeps its part; nothing is sent.

    Raises:
        WeightsError: see :func:`m4ov.models.qwen3_vl.read`.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in read(folder, model.config):
            parameter = parameters[name]
            if isinstance(parameter, DTensor):
                value = value.to(parameter.device, parameter.dtype)
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(value)

"""Tensor parallelism with sequence parallelism: heads, MLP columns and the vocabulary split over neighbouring ranks.

Between the blocks a rank holds its share of the rows ``[T/tp, D]``. Attention and the dense MLP gather the rows,
compute their share of heads or columns on all of them, and hand back partial sums, which are reduced and scattered.
Embedding and head hold a part of the vocabulary. A mixture of experts works on the rank's rows as they are
(:mod:`m4ov.parallel.expert`), and the vision tower on the rank's share of the images, with whole weights.

Weights are DTensors on the axis ``tp``; operators see their local parts: the hooks of :func:`localize` put these in a
block's place while it runs. A replicated weight (norms, router) meets other rows or other heads on every rank, so its
gradient comes back as ``Partial`` and is summed over the axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.models.qwen3_vl.vision import VisionFeatures, VisionTower
from m4ov.parallel import collectives
from m4ov.parallel.mesh import Mesh

#: Where the weights of a decoder layer are cut; what is not here is replicated.
_CUTS = {
    "self_attn.q_proj.weight": Shard(0),
    "self_attn.k_proj.weight": Shard(0),
    "self_attn.v_proj.weight": Shard(0),
    "self_attn.q_proj.bias": Shard(0),
    "self_attn.k_proj.bias": Shard(0),
    "self_attn.v_proj.bias": Shard(0),
    "self_attn.o_proj.weight": Shard(1),
    "mlp.gate_proj.weight": Shard(0),
    "mlp.up_proj.weight": Shard(0),
    "mlp.down_proj.weight": Shard(1),
}


@dataclass(frozen=True)
class TensorParallel:
    """What the tensor ranks share.

    Attributes:
        split_images: deal the images of a batch out among them. If not, each runs the tower on all images, and only
            the gradient of its own rows' features comes back: more work, one collective less.
    """

    split_images: bool = True


def split(model: Qwen3VL, mesh: Mesh, config: TensorParallel | None = None) -> Qwen3VL:
    """Split a model in place over the axis ``tp``; nothing where it has one rank. Before
    :func:`m4ov.parallel.data.shard`. Every rank must hold the same weights (or be on meta); nothing is sent.

    ``model(batch)`` returns the hidden states of all rows on every rank. What is made of them must hand back this
    rank's part of their gradient, as the head does (and every operator with ``group_name``).
    """
    group = mesh.group("tp")
    if group is None:
        return model
    axis, config = mesh.submesh("tp"), config or TensorParallel()
    rows = _Rows(group)
    model.model.register_forward_pre_hook(rows.begin)
    layer: Any
    for layer in model.model.language_model.layers:
        _distribute(layer, axis, _CUTS)
        localize(layer)
        layer.self_attn.register_forward_pre_hook(rows.gather)
        layer.self_attn.register_forward_hook(rows.scatter)
        if layer.self_attn.o_proj.bias is not None:
            layer.self_attn.o_proj.forward = partial(_project, layer.self_attn.o_proj, dist.get_rank(group) == 0)
        if not layer.sparse:  # experts take the rows as they are
            layer.mlp.register_forward_pre_hook(rows.gather)
            layer.mlp.register_forward_hook(rows.scatter)
    embed, norm, head = model.model.language_model.embed_tokens, model.model.language_model.norm, model.lm_head
    _distribute(embed, axis, {"weight": Shard(0)})
    _distribute(norm, axis, {})
    if not model.config.tie_word_embeddings:
        _distribute(head, axis, {"weight": Shard(0)})
    model.tie_weights()
    embed.forward = partial(_embed, embed, group)  # type: ignore[method-assign]
    for module in (embed, norm, head):
        localize(module)
    norm.register_forward_hook(rows.gather_output)
    head.group_name = group.group_name
    see = model.model.see
    model.model.see = lambda batch: _own_rows(see(batch), batch.tokens, group)  # type: ignore[method-assign]
    if config.split_images:
        _Images(group).attach(model.model.visual)
    return model


def _distribute(module: nn.Module, axis: DeviceMesh, cuts: dict[str, Shard]) -> None:
    for name, parameter in list(module.named_parameters()):
        if ".experts." in f".{name}":
            continue
        owner, _, short = name.rpartition(".")
        placement = cuts.get(name, Replicate())
        made = distribute_tensor(parameter.detach(), axis, [placement], src_data_rank=None)
        module.get_submodule(owner).register_parameter(short, nn.Parameter(made, parameter.requires_grad))


def localize(unit: nn.Module) -> None:
    """While ``unit`` runs, its modules hold the local parts of their DTensors, as tensors that hand gradients back.

    FSDP's own hooks must surround these, so it is applied later, to the same ``unit`` or around it; modules inside that
    FSDP shards for themselves see to themselves.
    """
    swapped: list[tuple[nn.Module, str, Any]] = []

    def before(module: nn.Module, args: Any) -> None:
        for owner, name, parameter in _distributed(module):
            swapped.append((owner, name, parameter))
            owner._parameters[name] = _local(parameter)  # type: ignore[arg-type, assignment]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        while swapped:
            owner, name, parameter = swapped.pop()
            owner._parameters[name] = parameter

    unit.register_forward_pre_hook(before)
    unit.register_forward_hook(after, always_call=True)


def _distributed(unit: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for prefix, module in unit.named_modules():
        if "experts" in prefix.split("."):
            continue
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                yield module, name, parameter


def _local(parameter: DTensor) -> Tensor:
    """The part that is here. Ranks that hold the same weight use it on different rows or heads."""
    grads = [Partial() if placement.is_replicate() else placement for placement in parameter.placements]
    return parameter.to_local(grad_placements=grads)


class _Rows:
    """The hooks that gather and scatter the rows of a batch; they know how many there are once it begins."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.size = group, dist.get_world_size(group)
        self.total = 0

    def begin(self, module: nn.Module, args: Any) -> None:
        self.total = args[0].tokens

    def gather(self, module: nn.Module, args: Any) -> Any:
        return (self.gather_output(module, args, args[0]), *args[1:])

    def gather_output(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return collectives.gather_rows(output, collectives.shares(self.total, self.size), self.group)

    def scatter(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return collectives.scatter_rows(output, self.group)


def _embed(module: nn.Embedding, group: ProcessGroup, input_ids: Tensor) -> Tensor:
    """``[T]`` of the whole vocabulary → this rank's share of the rows."""
    weight = module.weight
    rows = input_ids - dist.get_rank(group) * weight.shape[0]
    here = (rows >= 0) & (rows < weight.shape[0])
    if module.padding_idx is not None:  # its embedding has no gradient
        found = F.embedding(rows.clamp(0, weight.shape[0] - 1), weight)
        found = torch.where((input_ids == module.padding_idx)[:, None], found.detach(), found)
    else:
        found = F.embedding(rows.clamp(0, weight.shape[0] - 1), weight)
    return collectives.scatter_rows(torch.where(here[:, None], found, 0.0), group)


def _project(module: nn.Linear, adds_bias: bool, hidden_states: Tensor) -> Tensor:
    """A product of which the ranks have summands: one rank adds the bias. It stays in the graph of the others, whose
    gradient of it is zero."""
    bias = module.bias if adds_bias else module.bias * 0
    return F.linear(hidden_states, module.weight, bias)


def _own_rows(
    seen: tuple[VisionFeatures, Tensor] | None, total: int, group: ProcessGroup
) -> tuple[VisionFeatures, Tensor] | None:
    """The features whose tokens are this rank's, and where among its rows these are."""
    if seen is None:
        return None
    features, positions = seen
    place = collectives.share(total, group)
    here = ((positions >= place.start) & (positions < place.stop)).nonzero()[:, 0]
    merged, *deepstack = (part.index_select(0, here) for part in (features.merged, *features.deepstack))
    return VisionFeatures(merged, tuple(deepstack)), positions[here] - place.start


class _Images:
    """Deals the images of a call of the vision tower out among the ranks, and gathers their features."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.counts: list[int] = []

    def attach(self, tower: VisionTower) -> None:
        self.merge = tower.config.spatial_merge_size**2
        tower.register_forward_pre_hook(self.deal)
        tower.register_forward_hook(self.collect)

    def deal(self, module: nn.Module, args: Any) -> Any:
        """This rank's images; zeros of the smallest size if it has none, whose features are dropped."""
        pixel_values, grid_thw, grids = args
        sizes = [math.prod(grid) for grid in grids]
        ends = split_evenly(sizes, self.size)
        begin, end = ends[self.rank], ends[self.rank + 1]
        self.counts = [sum(sizes[a:b]) // self.merge for a, b in pairwise(ends)]
        if begin == end:
            side = math.isqrt(self.merge)
            return (
                pixel_values.new_zeros(self.merge, pixel_values.shape[1]),
                grid_thw.new_tensor([[1, side, side]]),
                ((1, side, side),),
            )
        first = sum(sizes[:begin])
        own = pixel_values[first : first + sum(sizes[begin:end])]
        return own, grid_thw[begin:end], tuple(grids[begin:end])

    def collect(self, module: nn.Module, args: Any, output: VisionFeatures) -> VisionFeatures:
        parts = (output.merged, *output.deepstack)
        own = torch.cat(parts, 1)[: self.counts[self.rank]]
        gathered = collectives.gather_rows(own, self.counts, self.group)
        # Copies: FSDP, around this, must not hand on views.
        merged, *deepstack = (part.clone() for part in gathered.split(output.merged.shape[1], 1))
        return VisionFeatures(merged, tuple(deepstack))


def split_evenly(sizes: Sequence[int], ranks: int) -> list[int]:
    """Bounds ``[ranks + 1]`` of consecutive parts whose sums are about equal: an item goes to the part in which its
    middle lies."""
    total, before = max(sum(sizes), 1), 0
    owners = []
    for size in sizes:
        owners.append(min((2 * before + size) * ranks // (2 * total), ranks - 1))
        before += size
    return [sum(owner < rank for owner in owners) for rank in range(ranks + 1)]

"""The mesh: which rank does what. One world seen twice, as a dense and as a sparse (expert) mesh, and what is legal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a layout can be checked where no torch is imported yet
    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

#: The dense view, from the slowest to the fastest rank. The sparse view is pp, dp_replicate, ep_shard, ep, where
#: ep_shard · ep = dp_shard · cp · tp: experts are spread over ranks that hold different tokens of one replica.
DENSE = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
SPARSE = ("pp", "dp_replicate", "ep_shard", "ep")
_LABELS = {"pp": "pp", "dp": "dp_replicate", "fsdp": "dp_shard", "cp": "cp", "tp": "tp", "ep": "ep"}


class LayoutError(ValueError):
    """A layout does not fit the world or the model; the message names the number and the nearest legal layouts."""


@dataclass(frozen=True)
class Layout:
    """How many ranks each axis has. Written ``dp2-fsdp2-tp2-ep4``, where 1 may be left out; ``1`` is a single rank.

    Attributes:
        pp: pipeline stages.
        dp_replicate: replicas of the (sharded) model, each with samples of its own.
        dp_shard: ranks over which weights, gradients and optimiser states are sharded, each with samples of its own.
        cp: ranks that share a sequence.
        tp: ranks that share the heads, the width of the MLPs and the vocabulary.
        ep: ranks that share the experts, folded over dp_shard · cp · tp; it adds no ranks.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name, size in asdict(self).items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise LayoutError(f"layout: {name} must be a whole number of at least 1; got {size!r}")

    @classmethod
    def parse(cls, label: str) -> Layout:
        """The layout of ``dp2-fsdp2-tp2-ep4``.

        Raises:
            LayoutError: naming the part that is none of dp, fsdp, tp, ep, cp and pp with a number.
        """
        if label == "1":
            return cls()
        sizes: dict[str, int] = {}
        for part in label.split("-"):
            found = re.fullmatch(r"([a-z]+)([0-9]+)", part)
            name = _LABELS.get(found[1]) if found else None
            if found is None or name is None or name in sizes:
                expected = "parts such as dp2, fsdp2, tp2, ep2, cp2, pp2, each once, joined by '-'"
                raise LayoutError(f"layout {label!r}: expected {expected}; got {part!r}")
            sizes[name] = int(found[2])
        return cls(**sizes)

    def __str__(self) -> str:
        parts = [f"{short}{getattr(self, name)}" for short, name in _LABELS.items() if getattr(self, name) > 1]
        return "-".join(parts) or "1"

    @property
    def world(self) -> int:
        """Ranks."""
        return math.prod(getattr(self, name) for name in DENSE)

    @property
    def fold(self) -> int:
        """Ranks of one stage of one replica, over which the experts can be spread."""
        return self.dp_shard * self.cp * self.tp

    @property
    def ep_shard(self) -> int:
        """Ranks that hold the same experts in one replica, and shard their weights."""
        return self.fold // self.ep

    @property
    def data(self) -> int:
        """Ranks that have samples of their own."""
        return self.dp_replicate * self.dp_shard


@dataclass(frozen=True)
class ModelSizes:
    """What of a model must be divisible. 0 experts: a dense model."""

    layers: int
    heads: int
    key_value_heads: int
    intermediate_size: int
    vocab_size: int
    experts: int = 0

    @classmethod
    def of(cls, config: Any) -> ModelSizes:
        """Of a :class:`m4ov.models.qwen3_vl.Config`."""
        text = config.text
        return cls(
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            key_value_heads=text.num_key_value_heads,
            intermediate_size=text.intermediate_size,
            vocab_size=text.vocab_size,
            experts=text.num_experts,
        )


def check(layout: Layout, world: int, model: ModelSizes | None = None) -> None:
    """Refuse a layout that does not fit. Needs no process group, and is to be called before there is one.

    Raises:
        LayoutError: naming the number that does not divide, and the nearest layouts that are legal.
    """
    problem = _problem(layout, world, model)
    if problem is None:
        return
    near = nearest(layout, world, model)
    hint = ", ".join(map(str, near)) if near else "none"
    raise LayoutError(f"layout {layout}: {problem}; nearest legal layouts of {world} ranks: {hint}")


def _problem(layout: Layout, world: int, model: ModelSizes | None) -> str | None:
    if layout.world != world:
        product = " · ".join(f"{name} {getattr(layout, name)}" for name in DENSE if getattr(layout, name) > 1)
        return f"it has {layout.world} ranks ({product or 'all axes are 1'}), the world has {world}"
    if layout.fold % layout.ep:
        return f"ep {layout.ep} does not divide the {layout.fold} ranks of dp_shard · cp · tp, over which it is folded"
    if model is None:
        return None
    if model.experts == 0 and layout.ep > 1:
        return f"ep {layout.ep} needs experts, and the model is dense"
    wanted = [
        ("pp", layout.pp, model.layers, "layers"),
        ("tp", layout.tp, model.heads, "attention heads"),
        ("tp", layout.tp, model.key_value_heads, "key-value heads"),
        ("tp", layout.tp, model.intermediate_size, "columns of the MLPs"),
        ("tp", layout.tp, model.vocab_size, "words of the vocabulary"),
        ("ep", layout.ep, model.experts, "experts"),
    ]
    for axis, size, count, what in wanted:
        if count % size:
            legal = [n for n in range(1, count + 1) if count % n == 0]
            close = sorted(legal, key=lambda n: abs(math.log(n / size)))[:3]
            return f"{axis} {size} does not divide the {count} {what} (legal and near: {', '.join(map(str, close))})"
    return None


def nearest(layout: Layout, world: int, model: ModelSizes | None = None, count: int = 3) -> list[Layout]:
    """The legal layouts of a world that differ least from ``layout``, by the ratios of their axes; with pipeline or
    context ranks only if it has some."""

    def distance(other: Layout) -> tuple[float, tuple[int, ...]]:
        pairs = [(getattr(layout, field.name), getattr(other, field.name)) for field in fields(Layout)]
        return sum(abs(math.log(a / b)) for a, b in pairs), tuple(b for _, b in pairs)

    def considered(other: Layout) -> bool:
        return all(getattr(other, axis) == 1 or getattr(layout, axis) > 1 for axis in ("pp", "cp"))

    legal = [other for other in layouts(world) if considered(other) and _problem(other, world, model) is None]
    return sorted(legal, key=distance)[:count]


def layouts(world: int) -> Iterator[Layout]:
    """Every layout of a world, whatever the model."""

    def split(rest: int, axes: Sequence[str], sizes: dict[str, int]) -> Iterator[dict[str, int]]:
        if len(axes) == 1:
            yield sizes | {axes[0]: rest}
            return
        for size in (n for n in range(1, rest + 1) if rest % n == 0):
            yield from split(rest // size, axes[1:], sizes | {axes[0]: size})

    for sizes in split(world, DENSE, {}):
        dense = Layout(**sizes)
        yield from (replace(dense, ep=ep) for ep in range(1, dense.fold + 1) if dense.fold % ep == 0)


class Mesh:
    """The process groups of a layout: of each axis that has more than one rank, and of what FSDP shards over.

    Attributes:
        layout: as given.
        dense, sparse, folded: the views, over the same ranks; an axis of one rank is left out, except the one that
            FSDP shards over.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        model: ModelSizes | None = None,
        device_type: str = "cpu",
        timeout: timedelta | None = None,
    ) -> None:
        """Collective over the world, whose process group must exist.

        Args:
            model: checked with the layout, if given.
            timeout: of every collective of these groups; ``None``: torch's.

        Raises:
            LayoutError: see :func:`check`; before any group is made.
        """
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.distributed_c10d import _set_pg_timeout

        check(layout, dist.get_world_size(), model)
        self.layout, self.device_type = layout, device_type

        def view(names: Sequence[str], always: str) -> DeviceMesh:
            kept = [name for name in names if name == always or getattr(layout, name) > 1]
            shape = tuple(getattr(layout, name) for name in kept)
            found = init_device_mesh(device_type, shape, mesh_dim_names=tuple(kept))
            if timeout is not None:  # the groups of a mesh do not take the world's
                for group in found.get_all_groups():
                    _set_pg_timeout(timeout, group)
            return found

        self.dense = view(DENSE, "dp_shard")
        # What holds whole weights and works on other rows on every rank (the vision tower, experts that are not spread)
        # is sharded over all ranks of a replica: fold = dp_shard · cp · tp.
        alone = layout.fold == layout.dp_shard
        self.folded = self.dense if alone else view(("pp", "dp_replicate", "fold"), "fold")
        self.sparse = self.folded if layout.ep == 1 else view(SPARSE, "ep_shard")

    def __repr__(self) -> str:
        return f"Mesh({self.layout})"

    def size(self, axis: str) -> int:
        return int(getattr(self.layout, axis))

    def submesh(self, *axes: str) -> DeviceMesh:
        """Of the axes among these that are there; all of one view."""
        for view in (self.dense, self.folded, self.sparse):
            present = tuple(axis for axis in axes if axis in (view.mesh_dim_names or ()))
            if present and axes[-1] == present[-1]:
                return view[present if len(present) > 1 else present[0]]
        raise KeyError(f"{self!r} has no axis {axes[-1]}")

    def group(self, axis: str) -> ProcessGroup | None:
        """``None``: the axis has one rank, and needs none."""
        return self.submesh(axis).get_group() if self.size(axis) > 1 else None

    def rank(self, axis: str) -> int:
        """This rank's place on an axis."""
        return self.submesh(axis).get_local_rank() if self.size(axis) > 1 else 0

    @property
    def data_mesh(self) -> DeviceMesh:
        """What FSDP shards the layers over: the last axis; a first one replicates."""
        return self.submesh("dp_replicate", "dp_shard")

    @property
    def expert_mesh(self) -> DeviceMesh:
        """What FSDP shards the experts over."""
        return self.fold_mesh if self.layout.ep == 1 else self.submesh("dp_replicate", "ep_shard")

    @property
    def fold_mesh(self) -> DeviceMesh:
        """What FSDP shards the vision tower over."""
        return self.data_mesh if self.folded is self.dense else self.submesh("dp_replicate", "fold")

    @property
    def data_rank(self) -> int:
        """Which samples are this rank's: a number below ``layout.data``."""
        return self.rank("dp_replicate") * self.layout.dp_shard + self.rank("dp_shard")

    def axis_of_group(self) -> dict[str, str]:
        """Name of a process group → its axis, for logs."""
        names: dict[str, str] = {}
        for view in (self.folded, self.sparse, self.dense):
            for axis, group in zip(view.mesh_dim_names or (), view.get_all_groups(), strict=True):
                names[str(group.group_name)] = axis
        return names

    def all_reduce(self, tensor: Tensor, axes: Sequence[str]) -> Tensor:
        """The sum over the ranks of some axes, in place; not differentiable."""
        import torch.distributed as dist

        for axis in axes:
            group = self.group(axis)
            if group is not None:
                dist.all_reduce(tensor, group=group)
        return tensor

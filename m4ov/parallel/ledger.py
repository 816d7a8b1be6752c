"""The collective ledger: what a rank sends and receives, counted by axis and kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operator → (kind, which argument is counted). c10d's have (outputs, inputs, …), the functional ones the input alone;
# what is counted is the larger side: what an all-gather fills, what a reduce-scatter takes, what an all-to-all sends.
_KINDS = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::allreduce_coalesced_": ("all_reduce", 0),
    "c10d::allgather_": ("all_gather", 0),
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", 0),
    "c10d::reduce_scatter_": ("reduce_scatter", 1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "c10d::alltoall_": ("all_to_all", 1),
    "c10d::alltoall_base_": ("all_to_all", 1),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::gather_": ("gather", 0),
    "c10d::scatter_": ("scatter", 0),
    "c10d::barrier": ("barrier", 0),
    "_c10d_functional::all_reduce": ("all_reduce", 0),
    "_c10d_functional::all_reduce_": ("all_reduce", 0),
    "_c10d_functional::all_reduce_coalesced": ("all_reduce", 0),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", None),
    "_c10d_functional::all_gather_into_tensor_out": ("all_gather", None),
    "_c10d_functional::all_gather_into_tensor_coalesced": ("all_gather", None),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional::reduce_scatter_tensor_coalesced": ("reduce_scatter", 0),
    "_c10d_functional::all_to_all_single": ("all_to_all", 0),
    "_c10d_functional::broadcast": ("broadcast", 0),
}


@dataclass(frozen=True)
class Entry:
    """How often, and how many bytes on this rank."""

    calls: int
    bytes: int


class Ledger(TorchDispatchMode):
    """Counts the collectives that are called while it is entered, forward and backward.

    ``entries``: (axis, kind) → :class:`Entry`. An all-gather counts what it fills, a reduce-scatter what it takes, an
    all-to-all what it sends, all on this rank.

    Args:
        axes: names of process groups → axes (:meth:`m4ov.parallel.mesh.Mesh.axis_of_group`); others: ``world``.

    Raises:
        NotImplementedError: while counting, a collective that it does not know.
    """

    def __init__(self, axes: dict[str, str]) -> None:
        super().__init__()
        self.axes = axes
        self.entries: dict[tuple[str, str], Entry] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.distributed.tensor import DTensor

        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with the local tensors and the collectives made of it
        found = func(*args, **(kwargs or {}))
        name = str(getattr(func, "_schema", func)).partition("(")[0].partition(".")[0]
        if name.startswith(("c10d::", "_c10d_functional::")) and not name.endswith(
            ("wait_tensor", "_wrap_tensor_autograd")
        ):
            if name not in _KINDS:
                raise NotImplementedError(f"the ledger does not know {name}; add it to its table")
            kind, place = _KINDS[name]
            counted = found if place is None else args[place]
            size = sum(leaf.nbytes for leaf in tree_leaves(counted) if isinstance(leaf, Tensor))
            key = (self._axis(args, kwargs or {}), kind)
            before = self.entries.get(key, Entry(0, 0))
            self.entries[key] = Entry(before.calls + 1, before.bytes + size)
        return found

    def _axis(self, args: Any, kwargs: Any) -> str:
        for value in (*args, *kwargs.values()):
            if isinstance(value, str) and value in self.axes:
                return self.axes[value]
            if "ProcessGroup" in str(type(value)) or "ScriptObject" in str(type(value)):
                try:
                    group = value if isinstance(value, ProcessGroup) else ProcessGroup.unbox(value)
                except (RuntimeError, TypeError):  # another object: a ReduceOp
                    continue
                return self.axes.get(group.group_name, "world")
        return "world"

    def table(self) -> dict[str, dict[str, list[int]]]:
        """axis → kind → [calls, bytes], sorted, as JSON has it."""
        found: dict[str, dict[str, list[int]]] = {}
        for axis, kind in sorted(self.entries):
            found.setdefault(axis, {})[kind] = [self.entries[axis, kind].calls, self.entries[axis, kind].bytes]
        return found

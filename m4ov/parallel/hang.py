"""When a collective times out: which one it was, who waited in it and who did not come."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

_SYMPTOM = re.compile(r"timed? ?out|timeout|closed by peer|reset by peer|broken pipe", re.IGNORECASE)
_KEY = "m4ov/hang"


class HungRankError(RuntimeError):
    """A collective did not complete; the message names it, the ranks that waited in it and those that did not come."""


@contextmanager
def named(axes: dict[str, str] | None = None, patience: float = 3.0) -> Iterator[None]:
    """Turns the time-out of a collective inside into a :class:`HungRankError`. Costs nothing until there is one.

    Args:
        axes: names of process groups → what they are called (:meth:`m4ov.parallel.mesh.Mesh.axis_of_group`).
        patience: seconds to wait for the other ranks of the group to say that they wait too. The process groups'
            time-outs must not differ by more.
    """
    try:
        yield
    except HungRankError:
        raise
    except RuntimeError as error:
        if not dist.is_initialized() or not _SYMPTOM.search(str(error)):
            raise
        raise HungRankError(_explain(error, axes or {}, patience)) from error


def _explain(error: RuntimeError, axes: dict[str, str], patience: float) -> str:
    collective, group = _collective(error)
    members = dist.get_process_group_ranks(group) if group is not None else list(range(dist.get_world_size()))
    name = "the world" if group is None else axes.get(group.group_name, f"group {group.group_name}")
    store: Any = dist.distributed_c10d._get_default_store()
    store.set(f"{_KEY}/{dist.get_rank()}", collective)
    deadline = time.monotonic() + patience
    waiting: dict[int, str] = {}
    while len(waiting) < len(members) and time.monotonic() < deadline:
        for rank in members:
            if rank not in waiting and store.check([f"{_KEY}/{rank}"]):
                waiting[rank] = store.get(f"{_KEY}/{rank}").decode()
        time.sleep(0.02)
    missing = [rank for rank in members if rank not in waiting]
    here = [rank for rank, where in waiting.items() if where == collective]
    elsewhere = [f"rank {rank} waits in {where}" for rank, where in sorted(waiting.items()) if where != collective]
    text = f"{collective} over {name} (ranks {_list(members)}) did not complete: ranks {_list(sorted(here))} waited"
    text += f", ranks {_list(missing)} did not come" if missing else ", and no rank is missing"
    text += "".join(f"; {where}" for where in elsewhere)
    return f"{text} ({' '.join(str(error).split())})"


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _collective(error: RuntimeError) -> tuple[str, ProcessGroup | None]:
    """The outermost function of torch.distributed on the way to the error that is given a group, else the innermost;
    one of the collectives themselves comes before one that only waits, as FSDP's do."""
    name, waits = "a collective", None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if not _of_torch_distributed(frame) or frame.f_code.co_name.startswith(("wrapper", "_")):
            continue
        name = frame.f_code.co_name
        found = frame.f_locals.get("group")
        if frame.f_globals.get("__name__", "").endswith("distributed_c10d"):
            return name, found if isinstance(found, ProcessGroup) else dist.group.WORLD
        if waits is None and isinstance(found, ProcessGroup):
            waits = name, found
    return waits or (name, None)


def _of_torch_distributed(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("torch.distributed")

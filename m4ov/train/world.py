"""The ranks of a run, and the collectives of its loop: small sums, plain gradients, what rank 0 alone does."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from m4ov.parallel import hang
from m4ov.parallel.mesh import Mesh

R = TypeVar("R")
_BUCKET = 2**24  # numbers that travel in one all-reduce: 64 MiB, the most that is held twice


class RankError(RuntimeError):
    """A collective did not end; the message names it, and the ranks that never came to it."""


class World:
    """The ranks of a run; one rank needs no process group.

    Args:
        rank, size: of this process, and how many there are.
        data_rank, data_size: which share of a step's samples is this rank's, of how many; ``None``: every rank has its
            own. Ranks that share samples (tensor, context, pipeline parallel) have the same ``data_rank``.
        patience: seconds that a rank whose collective failed waits for the others to say where they are.

    Attributes:
        seconds: spent in the collectives of this object, waiting for others included; the loop sets it back. Those that
            a sharded model makes in its forward and backward are not in it.
        axes: names of process groups → what errors call them.
        mesh: that the samples follow; ``None``: every rank has its own.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        data_rank: int | None = None,
        data_size: int | None = None,
        patience: float = 3.0,
    ) -> None:
        self.rank, self.size, self.patience = rank, size, patience
        self.data_rank = rank if data_rank is None else data_rank
        self.data_size = size if data_size is None else data_size
        self.axes: dict[str, str] = {}
        self.mesh: Mesh | None = None
        self.seconds = 0.0

    @classmethod
    def start(cls, timeout_seconds: float = 600.0) -> World:
        """Join the ranks that torchrun started; a process that it did not start is alone.

        The default process group is gloo on a CPU, gloo and NCCL where there are GPUs, each rank on its own.

        Raises:
            RankError: not all ranks came in time.
        """
        if ranks_started() == 1:
            return cls()
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
        timeout = timedelta(seconds=timeout_seconds)
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(_attempt(store, rank, size, timeout_seconds), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        return cls(rank, size, patience=min(3.0, timeout_seconds / 10))

    def follow(self, mesh: Mesh) -> None:
        """From here on the samples are those that a mesh gives this rank: the ranks of its other axes share them."""
        self.mesh, self.data_rank, self.data_size = mesh, mesh.data_rank, mesh.layout.data
        self.axes = mesh.axis_of_group()

    @property
    def first(self) -> bool:
        """Whether this rank writes folders and talks."""
        return self.rank == 0

    def close(self) -> None:
        """Leave the others; what follows is this rank's own."""
        if self.size > 1:
            dist.destroy_process_group()

    def alone(self, what: str, function: Callable[[], R]) -> R | None:
        """Rank 0 calls ``function`` while the others wait. Its result, ``None`` on the others.

        Raises:
            Exception: whatever it raised, on every rank.
        """
        if self.size == 1:
            return function()
        result, error = None, None
        if self.first:
            try:
                result = function()
            except Exception as raised:
                error = raised
        error = self.share(what, error)
        if error is not None:
            raise error
        return result

    def share(self, what: str, value: Any) -> Any:
        """What rank 0 has, on every rank (pickled)."""
        box = [value]
        if self.size > 1:
            with self.collective(what):
                dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def reduce(self, what: str, values: Sequence[float], *, largest: bool = False) -> list[float]:
        """Numbers summed over all ranks in float64, or the largest of them; the same bits everywhere."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with self.collective(what):
            dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        return tensor.tolist()

    def sum_gradients(self, what: str, weights: Sequence[Tensor]) -> None:
        """Add up the gradients of replicated weights over all ranks.

        A rank without a gradient of some weight counts as zero; a weight that has none on any rank keeps none, as in
        a run of one process. One float32 all-reduce for every 64 MiB; the result has the same bits on every rank.
        """
        if self.size == 1 or not weights:
            return
        for bucket in _buckets(weights):
            present = torch.tensor([float(weight.grad is not None) for weight in bucket])
            parts = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in bucket]
            flat = torch.cat([*(part.flatten() for part in parts), present.to(parts[0].device)])
            with self.collective(what):
                dist.all_reduce(flat)
            *sums, present = flat.split([*(part.numel() for part in parts), len(bucket)])
            for weight, total, count in zip(bucket, sums, present.tolist(), strict=True):
                weight.grad = total.view_as(weight) if count else None

    @contextmanager
    def collective(self, what: str) -> Iterator[None]:
        """Times what is inside, and says of a failure what it was and who is missing.

        Raises:
            RankError: a collective failed or timed out.
        """
        began = time.perf_counter()
        try:
            with hang.named(self.axes, self.patience):
                yield
        except RuntimeError as error:
            raise RankError(f"{what}: {error}") from error
        finally:
            self.seconds += time.perf_counter() - began

    @contextmanager
    def watched(self, what: str) -> Iterator[None]:
        """As :meth:`collective`, around work with collectives inside: not timed, and other errors are let through.

        Raises:
            RankError: a collective timed out, or a rank that it needs has ended.
        """
        try:
            with hang.named(self.axes, self.patience):
                yield
        except hang.HungRankError as error:
            raise RankError(f"{what}: {error}") from error


def ranks_started() -> int:
    """How many ranks torchrun started, this one among them; needs no process group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _attempt(store: dist.Store, rank: int, size: int, timeout_seconds: float) -> str:
    """A name for this start of the ranks, agreed upon by all of them, that no earlier start had.

    torchrun keeps its store when it starts ranks again; a rank could take the address of one that is dead for that of
    its successor. Each rank asks with a word that is its own, so only the living can answer.
    """
    if rank:
        word = secrets.token_hex(8)
        store.set(f"m4ov/asks/{rank}", word)
        name = store.get(f"m4ov/answers/{word}").decode()
        store.set(f"{name}/{rank}", "")
        return name
    name, waiting = f"m4ov/{secrets.token_hex(8)}", set(range(1, size))
    deadline = time.monotonic() + timeout_seconds
    while waiting:
        for other in sorted(waiting):
            if store.check([f"{name}/{other}"]):
                waiting.discard(other)
            elif store.check([f"m4ov/asks/{other}"]):
                store.set(f"m4ov/answers/{store.get(f'm4ov/asks/{other}').decode()}", name)
        if time.monotonic() > deadline:
            raise RankError(f"start: ranks {sorted(waiting)} of {size} did not come in {timeout_seconds:g} s")
        time.sleep(0.01)
    return name


def _buckets(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for weight in weights:
        if bucket and size + weight.numel() > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(weight)
        size += weight.numel()
    yield bucket

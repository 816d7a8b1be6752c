"""Differentiable collectives on local tensors. Ranks may have different numbers of rows, none included: only what
travels is padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

# torch 2.13's names; before it there are only the second ones.
_gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_into: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def shares(total: int, size: int) -> list[int]:
    """How many rows each of ``size`` ranks has of ``total``: the ceiling of its part, the last ones fewer or none."""
    each = -(-total // size)
    return [max(0, min(each, total - rank * each)) for rank in range(size)]


def share(total: int, group: ProcessGroup) -> slice:
    """The rows of this rank."""
    counts, rank = shares(total, dist.get_world_size(group)), dist.get_rank(group)
    begin = sum(counts[:rank])
    return slice(begin, begin + counts[rank])


def gather_rows(rows: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """Each rank's ``[counts[rank], ...]`` → those of all, in order of rank. Backward: the ranks' gradients are summed,
    and each takes those of its rows; so each must hand back its own part of the gradient."""
    return _Gather.apply(rows, tuple(counts), group)


def scatter_rows(rows: Tensor, group: ProcessGroup) -> Tensor:
    """``[total, ...]``, summed over the ranks → this rank's share. Backward: the whole gradient, on every rank."""
    return _Scatter.apply(rows, group)


def exchange_rows(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup) -> Tensor:
    """All-to-all: ``sent[r]`` rows, in order, go to rank r; returns the ``received[r]`` rows of each, in order."""
    return _Exchange.apply(rows, list(sent), list(received), group)


def all_gather(rows: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """As :func:`gather_rows`, not differentiable."""
    each, size = max(counts), len(counts)
    if rows.shape[0] < each:
        rows = torch.cat([rows, rows.new_zeros(each - rows.shape[0], *rows.shape[1:])])
    gathered = rows.new_empty(size * each, *rows.shape[1:])
    _gather_into(gathered, rows.contiguous(), group=group)
    if size * each == sum(counts):
        return gathered
    return torch.cat([part[:count] for part, count in zip(gathered.split(each), counts, strict=True)])


def reduce_scatter(rows: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """``[sum(counts), ...]``, summed over the ranks → this rank's ``[counts[rank], ...]``; not differentiable."""
    each, size = max(counts), len(counts)
    if size * each > rows.shape[0]:
        padded = rows.new_zeros(size * each, *rows.shape[1:])
        for part, given in zip(padded.split(each), rows.split(list(counts)), strict=True):
            part[: given.shape[0]] = given
        rows = padded
    own = rows.new_empty(each, *rows.shape[1:])
    _scatter_into(own, rows.contiguous(), group=group)
    return own[: counts[dist.get_rank(group)]]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.counts, ctx.group = counts, group
        return all_gather(rows, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return reduce_scatter(grad, ctx.counts, ctx.group), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group, ctx.counts = group, shares(rows.shape[0], dist.get_world_size(group))
        return reduce_scatter(rows, ctx.counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return all_gather(grad, ctx.counts, ctx.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _exchange(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result

"""Differentiable collectives on local tensors. Rows may be as many as they like: a rank's share is the ceiling of its
part, the last ones have fewer or none, and only what travels is padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


def share(total: int, group: ProcessGroup) -> slice:
    """The rows of this rank, of ``total`` that are spread over a group in order."""
    each = _each(total, group)
    begin = min(dist.get_rank(group) * each, total)
    return slice(begin, min(begin + each, total))


def gather_rows(rows: Tensor, total: int, group: ProcessGroup) -> Tensor:
    """This rank's share ``[t, ...]`` → all rows ``[total, ...]``. Backward: the ranks' gradients are summed, and each
    takes those of its share; so each must hand back its own part of the gradient."""
    return _Gather.apply(rows, total, group)


def scatter_rows(rows: Tensor, group: ProcessGroup) -> Tensor:
    """``[total, ...]``, summed over the ranks → this rank's share. Backward: the whole gradient, the same everywhere."""
    return _Scatter.apply(rows, group)


def exchange_rows(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup) -> Tensor:
    """All-to-all: ``sent[r]`` rows, in order, go to rank r; returns the ``received[r]`` rows of each, in order."""
    return _Exchange.apply(rows, list(sent), list(received), group)


def _each(total: int, group: ProcessGroup) -> int:
    return -(-total // dist.get_world_size(group))


def _padded(rows: Tensor, count: int) -> Tensor:
    if rows.shape[0] == count:
        return rows.contiguous()
    padded = rows.new_zeros(count, *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    return padded


def all_gather(rows: Tensor, total: int, group: ProcessGroup) -> Tensor:
    """As :func:`gather_rows`, not differentiable."""
    each = _each(total, group)
    gathered = rows.new_empty(each * dist.get_world_size(group), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, _padded(rows, each), group=group)
    return gathered[:total]


def reduce_scatter(rows: Tensor, group: ProcessGroup) -> Tensor:
    """As :func:`scatter_rows`, not differentiable."""
    total, each = rows.shape[0], _each(rows.shape[0], group)
    own = rows.new_empty(each, *rows.shape[1:])
    dist.reduce_scatter_tensor(own, _padded(rows, each * dist.get_world_size(group)), group=group)
    place = share(total, group)
    return own[: place.stop - place.start]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, total: int, group: ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return all_gather(rows, total, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return reduce_scatter(grad, ctx.group), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group, ctx.total = group, rows.shape[0]
        return reduce_scatter(rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return all_gather(grad, ctx.total, ctx.group), None


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

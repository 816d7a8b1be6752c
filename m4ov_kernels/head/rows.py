"""The rows that are computed: those whose target is not ``ignore_index``."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from m4ov_kernels import device_errors
from m4ov_kernels.head.targets import check_target_values


class Rows(NamedTuple):
    """``target``: negative where the row has no loss; ``V`` where it is out of range (which only a device hides)."""

    input: Tensor
    target: Tensor
    index: Tensor | None  # type: ignore[assignment]  # their positions, or None: all of them
    left_out: Tensor | None  # device rows that count but did not fit in num_valid

    def take(self, values: Tensor, dim: int = -1) -> Tensor:
        """``values`` ``[..., T]`` (or with the rows in another dimension) of the computed rows."""
        return values.contiguous() if self.index is None else values.index_select(dim, self.index)

    def within(self, first: int, count: int) -> Tensor:
        """bool ``[rows]``: which targets are among ``count`` words from ``first`` on."""
        return (self.target >= first) & (self.target < first + count)

    def put(self, values: Tensor, count: int) -> Tensor:
        """``values`` ``[..., rows]`` as ``[..., count]``: 0 in other rows, NaN where a row was left out."""
        if self.index is None:
            return values
        result = values.new_zeros((*values.shape[:-1], count))
        if self.left_out is not None:
            result.masked_fill_(self.left_out, math.nan)
        return result.index_copy_(-1, self.index, values)

    def put_rows(self, result: Tensor, values: Tensor) -> None:
        """``values`` ``[rows, ...]`` into ``result`` ``[T, ...]``, as :meth:`put`."""
        if self.index is None:
            if values is not result:
                result.copy_(values)
            return
        result.zero_()
        if self.left_out is not None:
            result.masked_fill_(self.left_out.view(-1, *[1] * (result.ndim - 1)), math.nan)
        result.index_copy_(0, self.index, values)


def computed_rows(
    operator: str,
    argument: str,
    input: Tensor,
    target: Tensor,
    vocab_size: int,
    ignore_index: int,
    num_valid: int | None,
    on_host: bool,
) -> Rows:
    """``on_host``: whether the host sees the targets. If not (a GPU, or Triton's interpreter in its place), nothing
    waits for them: ignored rows are masked, or sorted out where ``num_valid`` says how many stay."""
    if on_host:
        some = check_target_values(operator, argument, target, vocab_size, ignore_index)
        index = (target != ignore_index).nonzero().squeeze(1) if some else None
        if index is None or index.shape[0] == target.shape[0]:
            return Rows(input, target.contiguous(), None, None)
        return Rows(input.index_select(0, index), target.index_select(0, index), index, None)
    ignored = target == ignore_index
    bad = ~ignored & ((target < 0) | (target >= vocab_size))
    marked = torch.where(ignored, -1, torch.where(bad, vocab_size, target))
    if num_valid is None:
        return Rows(input, marked, None, None)
    order = torch.argsort(ignored.to(torch.uint8), stable=True)
    index = order[:num_valid]
    left_out = ~ignored
    left_out.index_fill_(0, index, False)
    return Rows(input.index_select(0, index), marked.index_select(0, index), index, left_out)


def report_bad_targets(operator: str, target: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Lower the device's error slot to the first target out of range; never waits for the device."""
    if target.numel() == 0:
        return
    slot = device_errors.flag(target.device, operator)
    bad = (target != ignore_index) & ((target < 0) | (target >= vocab_size))
    position = torch.arange(target.numel(), device=target.device)
    first = torch.where(bad, position, torch.iinfo(torch.int64).max).amin()
    slot.copy_(torch.minimum(slot, first))

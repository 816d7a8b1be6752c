"""``pack_sequences``: which sequences share a row of fixed length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.dispatch import native_extension
from m4ov_kernels.packing import reference

_OP = "pack_sequences"


@dataclass(frozen=True)
class Bins:
    """Sequences in bins; ``bins[b]`` are the indices of those in bin ``b``, the longest first.

    Attributes:
        order: int64 ``[N]``, indices of sequences, bin after bin.
        offsets: int64 ``[B + 1]``: bin ``b`` holds ``order[offsets[b] : offsets[b + 1]]``.
    """

    order: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return self.offsets.shape[0] - 1

    def __getitem__(self, index: int) -> Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} bins; got {index}")
        begin, end = self.offsets[index % len(self) :][:2].tolist()
        return self.order[begin:end]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.order.split(self.offsets.diff().tolist()))


def pack_sequences(lengths: Sequence[int] | Tensor, capacity: int) -> Bins:
    """Put sequences into as few bins as best-fit decreasing finds, which is near the fewest possible.

    From the longest to the shortest, each goes into the fullest bin that has room for it. The result is a function of
    the arguments alone: equally long sequences go in order, and of equally full bins the one that was used last is
    filled.

    Args:
        lengths: ``[N]`` whole numbers from 0 to ``capacity``: a sequence of them, or a tensor on the CPU.
        capacity: of a bin, 1 or greater; the compiled kernel serves capacities up to 2²⁴, plain Python any.

    Returns:
        The bins, in the order in which they were opened.

    Raises:
        TypeError: ``lengths`` are not whole numbers, or ``capacity`` is none.
        ValueError: ``capacity`` is not positive; a length is negative or above ``capacity``, with its index.

    Source: Johnson, "Near-optimal bin packing algorithms", 1973.
    """
    if isinstance(capacity, bool) or not isinstance(capacity, int):
        checks.refuse(TypeError, _OP, "capacity", "an int", checks.describe(capacity))
    if capacity < 1:
        checks.refuse(ValueError, _OP, "capacity", "1 or greater", repr(capacity))
    values = _as_tensor(lengths)
    if values.numel():
        low, high = (int(value) for value in torch.aminmax(values))
        if low < 0 or high > capacity:
            index = int(((values < 0) | (values > capacity)).nonzero()[0, 0])
            raise ValueError(f"{_OP}: lengths[{index}] is {int(values[index])}: expected 0 to {capacity}, the capacity")
    extension, _ = native_extension()
    if extension is not None and capacity <= extension.largest_bin:
        from m4ov_kernels.packing import native

        return Bins(*native.pack_sequences(values, capacity))
    bins = reference.pack_sequences(values.tolist(), capacity)
    order = torch.tensor([sequence for group in bins for sequence in group], dtype=torch.int64)
    return Bins(order, torch.tensor([0, *accumulate(map(len, bins))], dtype=torch.int64))


def _as_tensor(lengths: Sequence[int] | Tensor) -> Tensor:
    if isinstance(lengths, Tensor):
        values = lengths
    else:
        try:
            values = torch.as_tensor(lengths)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            checks.refuse(TypeError, _OP, "lengths", "whole numbers", checks.describe(lengths)[:80])
        if not values.numel():
            values = values.long()
    if values.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        checks.refuse(TypeError, _OP, "lengths", "whole numbers", checks.describe(values))
    if values.ndim != 1 or values.device.type != "cpu":
        checks.refuse(ValueError, _OP, "lengths", "[N], on the CPU", checks.describe(values))
    return values.long().contiguous()

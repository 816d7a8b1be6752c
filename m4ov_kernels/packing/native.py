"""``pack_sequences`` through the compiled kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from m4ov_kernels import _C

LARGEST_BIN: int = _C.largest_bin


def pack_sequences(lengths: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """``(order [N], offsets [B + 1])`` of ``lengths`` int64 ``[N]``, contiguous, from 0 to ``capacity``."""
    count = lengths.shape[0]
    order = torch.empty(count, dtype=torch.int64)
    offsets = torch.empty(count + 1, dtype=torch.int64)
    scratch = torch.empty(3 * count, dtype=torch.int64)
    rooms = torch.zeros(_C.pack_sequences_rooms(capacity), dtype=torch.int64)
    addresses = (order.data_ptr(), offsets.data_ptr(), lengths.data_ptr())
    bins = _C.pack_sequences(*addresses, count, capacity, scratch.data_ptr(), rooms.data_ptr())
    return order, offsets[: bins + 1].clone()

"""Keys and values of what has been read, in one slab of tokens for each layer.

A prompt has one run of the slab, which its samples share, and each sample one for what it draws, ``max_tokens`` long,
both reserved when the request is admitted. Why runs and not pages of a fixed size: the kernel reads a run where it
lies, in order, and gives the bits of prefilling; a prefix and an own run are all the sharing that samples of a prompt
need, without a table of pages; and what was admitted is never evicted. What it costs: room for tokens that are never
drawn (untouched, so the system gives it no memory).
"""

from __future__ import annotations

from bisect import bisect

import numpy as np
import torch
from torch import Tensor

from m4ov.models.qwen3_vl import TextConfig


class Slab:
    """Keys and values, each a list of ``[tokens, KV, D]`` by layer, and which runs of tokens are free."""

    def __init__(self, config: TextConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (tokens, config.num_key_value_heads, config.head_dim)
        self.tokens = tokens
        layers = range(config.num_hidden_layers)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self._free = [(0, tokens)]  # (first, size), ascending, none of them neighbours

    @staticmethod
    def bytes_per_token(config: TextConfig, dtype: torch.dtype) -> int:
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize

    @property
    def free_tokens(self) -> int:
        return sum(size for _, size in self._free)

    def take(self, sizes: list[int]) -> list[int] | None:
        """The first tokens of runs of these sizes, each in the first gap in which it fits; ``None``, and nothing is
        taken, if one does not fit."""
        before, taken = list(self._free), []
        for size in sizes:
            for place, (first, room) in enumerate(self._free):
                if room >= size:
                    self._free[place : place + 1] = [(first + size, room - size)] if room > size else []
                    taken.append(first)
                    break
            else:
                self._free = before
                return None
        return taken

    def give_back(self, first: int, size: int) -> None:
        """A run that was taken."""
        place = bisect(self._free, (first, size))
        end = first + size
        if place < len(self._free) and self._free[place][0] == end:
            end += self._free.pop(place)[1]
        if place and sum(self._free[place - 1]) == first:
            place -= 1
            first = self._free.pop(place)[0]
        self._free.insert(place, (first, end - first))


def gathered(offsets: np.ndarray, lengths: np.ndarray, first: np.ndarray, keys: np.ndarray) -> tuple[Tensor, Tensor]:
    """Which tokens of the slab n queries see, one query after the other, int64 ``[S]``; and ``cu_seqlens_k``,
    ``[n + 1]``: for kernels that know no prefix."""
    both, begins = np.stack([keys, lengths], 1).reshape(-1), np.stack([first, offsets], 1).reshape(-1)
    ends = np.cumsum(both)
    tokens = np.arange(int(ends[-1])) + np.repeat(begins - (ends - both), both)
    return torch.from_numpy(tokens), torch.from_numpy(np.concatenate([[0], ends[1::2]]))

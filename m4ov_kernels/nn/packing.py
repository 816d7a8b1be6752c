"""Several sequences in one row: which token belongs to which, and how to lay them out for batched work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A group of sequences is padded to its longest while the padding stays below a quarter of its tokens or below this
# many: about the work that one more group costs in calls.
_CHEAP_PADDING = 256


class Group(NamedTuple):
    """Sequences that are computed together: ``count`` rows of ``length`` slots; ``even``: no slot is padding."""

    count: int  # type: ignore[assignment]
    length: int
    even: bool


@dataclass(frozen=True)
class PackedSequences:
    """The sequences of a packed batch, and its tokens laid out as a few padded groups.

    Attributes:
        tokens: number of tokens of the batch, all rows together.
        groups: by falling length; together they have ``sum(count · length)`` slots.
        source: ``[slots]`` int64, the token in each slot; padding repeats the last token of its own sequence.
            ``None`` when the tokens lie as the groups want them already (all sequences equally long).
        slots: ``[tokens]`` int64, the slot of each token; ``None`` with ``source``.
        valid: ``[slots]`` bool, false at padding; ``None`` with ``source``.
    """

    tokens: int
    groups: tuple[Group, ...]
    source: Tensor | None
    slots: Tensor | None
    valid: Tensor | None

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> PackedSequences:
        """From the length of each sequence, in order; empty sequences are allowed."""
        if any(length < 0 for length in lengths):
            raise ValueError(f"PackedSequences: lengths must be 0 or greater; got {list(lengths)}")
        kept = torch.tensor([length for length in lengths if length], dtype=torch.int64)
        tokens = int(kept.sum())
        descending, order = torch.sort(kept, descending=True, stable=True)
        groups = _grouped(descending)
        if len(groups) <= 1 and all(group.even for group in groups):
            return cls(tokens, groups, None, None, None)
        starts = (kept.cumsum(0) - kept)[order, None]  # [N, 1]
        ends = starts + descending[:, None]
        source, valid, row = [], [], 0
        for count, length, _ in groups:
            position = starts[row : row + count] + torch.arange(length)  # [count, length]
            last = ends[row : row + count] - 1
            source.append(torch.minimum(position, last).flatten())
            valid.append((position <= last).flatten())
            row += count
        all_source, all_valid = torch.cat(source), torch.cat(valid)
        slots = torch.empty(tokens, dtype=torch.int64)
        slots[all_source[all_valid]] = all_valid.nonzero()[:, 0]
        return cls(tokens, groups, all_source.to(device), slots.to(device), all_valid.to(device))

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: Tensor, *, tokens: int | None = None, device: torch.device | str | None = None
    ) -> PackedSequences:
        """From cumulative lengths ``[N + 1]`` (int32 or int64), starting at 0 and ending at ``tokens``.

        Reads them on the host: a tensor on the CPU costs no synchronisation, one on a GPU costs one. ``device``: where
        the batch is, if not where ``cu_seqlens`` is.
        """
        if cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point() or cu_seqlens.shape[0] == 0:
            raise ValueError(f"PackedSequences: cu_seqlens must be integers [N + 1]; got {list(cu_seqlens.shape)}")
        bounds = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        if bounds[0] != 0 or min(lengths, default=0) < 0 or tokens not in (None, bounds[-1]):
            expected = "start at 0 and never fall" + (f", and end at {tokens} tokens" if tokens is not None else "")
            raise ValueError(f"PackedSequences: cu_seqlens must {expected}; got {bounds}")
        return cls.from_lengths(lengths, cu_seqlens.device if device is None else device)

    @classmethod
    def from_position_ids(cls, position_ids: Tensor) -> PackedSequences | None:
        """From text positions ``[B, T]``: a sequence begins where a position is not its predecessor plus one.

        This is Hugging Face's rule. ``None`` if each row is one sequence. Costs one synchronisation on a GPU.
        """
        begins = torch.ones_like(position_ids, dtype=torch.bool)
        begins[:, 1:] = position_ids.diff(dim=-1) != 1
        starts = begins.flatten().nonzero()[:, 0].tolist()
        if len(starts) == position_ids.shape[0]:
            return None
        ends = [*starts[1:], position_ids.numel()]
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        return cls.from_lengths(lengths, position_ids.device)

    def pad(self, tokens: Tensor) -> Tensor:
        """``[tokens, ...]`` → ``[slots, ...]``. Gradients of padding are dropped: they must be zero, or not matter."""
        return tokens if self.source is None else _Pad.apply(tokens, self.source, self.slots)

    def unpad(self, padded: Tensor) -> Tensor:
        """``[slots, ...]`` → ``[tokens, ...]``."""
        return padded if self.slots is None else _Unpad.apply(padded, self.slots)


def _grouped(descending: Tensor) -> tuple[Group, ...]:
    groups: list[Group] = []
    values, counts = torch.unique_consecutive(descending, return_counts=True)
    for length, count in zip(values.tolist(), counts.tolist(), strict=True):
        if groups:
            members, longest, _ = groups[-1]
            tokens = int(descending[sum(group.count for group in groups) - members :][: members + count].sum())
            padding = (members + count) * longest - tokens
            if padding <= max(_CHEAP_PADDING, tokens // 4):
                groups[-1] = Group(members + count, longest, False)
                continue
        groups.append(Group(count, length, True))
    return tuple(groups)


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, source: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return tokens.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (slots,) = ctx.saved_tensors
        return grad.index_select(0, slots), None, None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.rows = padded.shape[0]
        return padded.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (slots,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, slots, grad), None

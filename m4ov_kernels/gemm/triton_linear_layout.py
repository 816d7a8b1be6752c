"""How ``quantized_linear``'s Triton kernels read a weight: its canonical codes as they are, and beside them small
layouts that are made once for each weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

BLOCK = 128  # of fp8 blocks
GROUPS = (32, 64, 128)  # places of a group of four-bit codes, or multiples of the last


@dataclass(frozen=True)
class Layout:
    """``codes``: uint8 ``[N, …]``, of int4 bytes of two, or of e4m3; or int8. ``scales`` and ``zeros``: of weight row n
    and group g at ``n // scale_rows · scale_stride + g · scale_step``; ``group``: input places of a scale; ``grouped``:
    whether there is more than one. ``order``: int64, the input feature at each place, K where there is none, or
    ``None``."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    scale_rows: int
    scale_stride: int
    scale_step: int
    group: int
    grouped: bool


def layout_of(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, order: Tensor | None, kind: str, width: int, group: int
) -> Layout:
    """Of a weight's canonical tensors; ``order``: the group of each input feature (act-order)."""
    if kind != "int4":
        rows, groups = scale_steps(scales, codes.shape[0])
        # One row of scales has no next one.
        stride = 0 if scales.shape[0] == 1 else scales.stride(0)
        return Layout(codes, scales, None, None, rows, stride, scales.stride(1), BLOCK, groups > 1)
    if scales.shape[1] == 1:
        return Layout(codes, scales, zeros, None, 1, scales.stride(0), 1, width, False)
    places = None
    if order is not None:
        codes, places, group = _kept(_sorted, codes, order)
    by_group = _kept(_by_group, scales)
    zeros_by_group = None if zeros is None else _kept(_by_group, zeros)
    return Layout(codes, by_group, zeros_by_group, places, 1, 1, scales.shape[0], group, True)


def scale_steps(scales: Tensor, columns: int) -> tuple[int, int]:
    """Weight rows that share a scale (or all of them, where there is one row of scales), and groups along K."""
    rows, groups = scales.shape
    return (1 if rows in (1, columns) else BLOCK), groups


_layouts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _kept(make: Callable[..., Any], tensor: Tensor, *others: Tensor) -> Any:
    """``make(tensor, *others)``, kept as long as the tensor lives and nobody writes into one of them."""
    version = tuple((id(t), -1 if t.is_inference() else t._version) for t in (tensor, *others))
    found = _layouts.get(tensor)
    if found is None or found[0] != version:
        # With the others, so that no tensor to come can have the name of one of them.
        found = _layouts[tensor] = (version, others, make(tensor, *others))
    return found[2]


def _by_group(table: Tensor) -> Tensor:
    return table.t().contiguous()


def _sorted(codes: Tensor, order: Tensor) -> tuple[Tensor, Tensor, int]:
    """Codes sorted by their group, stably, each group padded to the longest, packed again; the input feature at each
    place; and places of a group."""
    group, width = order.long(), order.shape[0]
    counts = torch.bincount(group)
    longest = int(counts.max())  # waits for a GPU, once for each weight
    size = next((s for s in GROUPS if longest <= s), -(-longest // GROUPS[-1]) * GROUPS[-1])
    by_group = torch.argsort(group, stable=True)
    sorted_group = group[by_group]
    within = torch.arange(width, device=order.device) - (counts.cumsum(0) - counts)[sorted_group]
    places = torch.full((counts.shape[0] * size,), width, device=order.device)
    places[sorted_group * size + within] = by_group
    one_a_byte = F.pad(torch.stack((codes & 15, codes >> 4), -1).flatten(1)[:, :width], (0, 1))[:, places]
    return one_a_byte[:, 0::2] | (one_a_byte[:, 1::2] << 4), places, size


def ordered(x: Tensor, order: Tensor | None) -> Tensor:
    """The input's features in the order of the places, 0 where there is none."""
    return x if order is None else F.pad(x, (0, 1)).index_select(1, order)

"""Packed rows: which count, which sequence each belongs to, and sums over sequences.

A sum over a sequence is ``torch.segment_reduce`` on float64: one sum a segment in a fixed order (serial on the CPU,
CUB's segmented reduction on a GPU), so it is deterministic, and a sequence's bits do not depend on what is packed
beside it. ``index_add`` and ``scatter_add`` add with float atomics on a GPU; a difference of ``cumsum`` is not
deterministic there, and lets one sequence's infinity into all behind it. Its gradient is a gather, written here because
PyTorch's own backward walks each segment with one thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import checks, device_errors
from m4ov_kernels.bounds import check_bounds

_FLOATS = (torch.float32, torch.float64)
_NO_ERROR = torch.iinfo(torch.int64).max

Number = float | Tensor


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, bounds: Tensor, segment: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(segment)
        return torch.segment_reduce(values, "sum", offsets=bounds, axis=0, initial=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (segment,) = ctx.saved_tensors
        return grad[segment], None, None


@dataclass(frozen=True)
class Segments:
    """``bounds``: int64 ``[n + 1]``, safe to read with. ``segment``: int64 ``[T]``. ``valid``: bool, 0-dim: whether the
    bounds were as they must be; ``None`` where the host has looked."""

    bounds: Tensor
    segment: Tensor
    valid: Tensor | None

    def sums(self, values: Tensor) -> Tensor:
        """Of each segment's values (``[T]``), float64 ``[n]``."""
        return _SegmentSum.apply(values.double(), self.bounds, self.segment)

    def extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the greatest of each segment's values, ``[n]``; not differentiable."""
        least, greatest = (
            torch.segment_reduce(values.detach(), kind, offsets=self.bounds, axis=0) for kind in ("min", "max")
        )
        return least, greatest

    def spread(self, values: Tensor) -> Tensor:
        """Each segment's value (``[n]``) to its rows, ``[T]``. For values without gradients."""
        return values.detach()[self.segment]

    def or_nan(self, value: Tensor) -> Tensor:
        """``value``, and its gradient, as NaN where the bounds on a device turned out wrong."""
        return value if self.valid is None else value * torch.where(self.valid, 1.0, float("nan"))


def segments(operator: str, argument: str, bounds: Any, rows: Tensor) -> Segments:
    """Of ``rows`` (``[T]``), with ``bounds`` checked: on the CPU here, elsewhere on the device."""
    checks.index_tensor(operator, argument, bounds, (torch.int32, torch.int64))
    count = rows.shape[0]
    if bounds.ndim != 1 or bounds.shape[0] == 0:
        checks.refuse(ValueError, operator, argument, "[n + 1] bounds of n sequences", list(bounds.shape))
    if bounds.device != rows.device:
        checks.refuse(ValueError, operator, argument, f"on {rows.device}, as the rows", f"one on {bounds.device}")
    if bounds.shape[0] == 1 and count:
        checks.refuse(ValueError, operator, argument, f"bounds of {count} rows", "bounds of no sequence")
    bounds = bounds.long()
    valid = None
    if bounds.device.type != "cpu":
        bounds, valid = check_on_device(bounds, count)
    elif not torch.compiler.is_compiling():
        check_bounds(operator, argument, bounds, count)
    places = torch.arange(count, device=bounds.device)
    segment = torch.searchsorted(bounds[1:].contiguous(), places, right=True)
    return Segments(bounds, segment.clamp(max=max(bounds.shape[0] - 2, 0)), valid)


def check_on_device(bounds: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Bounds that can be read with whatever came, and whether they are those that came. Nothing is fetched: what is
    wrong is recorded for :func:`m4ov_kernels.check`."""
    places = torch.arange(bounds.shape[0], device=bounds.device)
    wrong = bounds < torch.cat((bounds.new_zeros(1), bounds[:-1]))
    wrong = wrong | ((places == 0) & (bounds != 0)) | ((places == bounds.shape[0] - 1) & (bounds != count))
    if not torch.compiler.is_compiling():
        slot = device_errors.flag(bounds.device, "head.losses")
        slot.copy_(torch.minimum(slot, torch.where(wrong, places, _NO_ERROR).min()))
    return bounds.clamp(0, count).cummax(0).values, ~wrong.any()


@dataclass(frozen=True)
class Rows:
    """``mask``: bool ``[T]``, the rows that count. ``counts``: float64 ``[n]``, how many a sequence has of them."""

    segments: Segments
    mask: Tensor
    counts: Tensor

    def kept(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """0 in ignored rows, whatever stood there, and for the gradient too."""
        return torch.where(self.mask, values, 0.0).to(dtype or values.dtype)

    def sums(self, values: Tensor) -> Tensor:
        """Of each sequence's rows that count, float64 ``[n]``. ``values`` are 0 elsewhere."""
        return self.segments.sums(values)

    def means(self, values: Tensor) -> Tensor:
        """As :meth:`sums`, over the number of rows that count; 0 where there are none."""
        return self.sums(values) / self.counts.clamp(min=1)


def packed_rows(operator: str, logprob: Any, cu_seqlens: Any, mask: Any, **others: Tensor | None) -> Rows:
    """Check what every loss takes: ``logprob`` ``[T]``, its bounds, its mask, and tensors shaped as it is."""
    float_rows(operator, "logprob", logprob)
    if logprob.ndim != 1:
        checks.refuse(ValueError, operator, "logprob", "[T], packed", list(logprob.shape))
    for name, tensor in others.items():
        if tensor is not None:
            float_rows(operator, name, tensor)
            _as_rows(operator, name, tensor, logprob)
    if mask is None:
        mask = torch.ones_like(logprob, dtype=torch.bool)
    else:
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            checks.refuse(TypeError, operator, "mask", "a bool tensor, True in rows that count", checks.describe(mask))
        _as_rows(operator, "mask", mask, logprob)
    found = segments(operator, "cu_seqlens", cu_seqlens, logprob)
    return Rows(found, mask, found.sums(mask))


def _as_rows(operator: str, name: str, tensor: Tensor, logprob: Tensor) -> None:
    if tensor.shape != logprob.shape:
        checks.refuse(ValueError, operator, name, f"{list(logprob.shape)}, as logprob", list(tensor.shape))
    if tensor.device != logprob.device:
        checks.refuse(ValueError, operator, name, f"on {logprob.device}, as logprob", f"one on {tensor.device}")


def float_rows(operator: str, argument: str, value: Any) -> None:
    """16-bit log-probabilities are refused: their difference has lost what a ratio is made of."""
    if not isinstance(value, Tensor) or value.dtype not in _FLOATS or value.layout is not torch.strided:
        checks.refuse(TypeError, operator, argument, "a dense float32 or float64 tensor", checks.describe(value))


def per_row(operator: str, argument: str, value: Any, per: str | None, rows: Rows) -> Tensor:
    """``[n]``, one a sequence (where ``n = T`` too), or ``[T]``, one a row; as one a row, 0 where ignored, detached."""
    float_rows(operator, argument, value)
    sequences, count = rows.counts.shape[0], rows.mask.shape[0]
    allowed = {"sequence": (sequences,), "token": (count,), None: (sequences, count)}[per]
    if value.ndim != 1 or value.shape[0] not in allowed:
        names = {"sequence": f"[{sequences}], one a sequence", "token": f"[{count}], one a row"}
        expected = names[per] if per else " or ".join(names.values())
        checks.refuse(ValueError, operator, argument, expected, list(value.shape))
    if value.device != rows.mask.device:
        checks.refuse(ValueError, operator, argument, f"on {rows.mask.device}, as logprob", f"one on {value.device}")
    value = value.detach()
    return rows.kept(value if per == "token" or value.shape[0] != sequences else rows.segments.spread(value))


def option(operator: str, argument: str, value: Any, low: float = 0.0, high: float = float("inf")) -> None:
    """Refuse anything but a finite number in ``[low, high]``."""
    checks.number(operator, argument, value)
    if isinstance(value, bool) or not low <= value <= high or value in (float("inf"), -float("inf")):
        span = f"a finite number, at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        checks.refuse(ValueError, operator, argument, span, repr(value))


def one_number(operator: str, argument: str, value: Any, device: torch.device) -> Number:
    """A finite number, or a tensor with one real element on ``device`` or the CPU (which spares a copy); detached."""
    if not isinstance(value, Tensor):
        option(operator, argument, value, -float("inf"))
        return float(value)
    if value.numel() != 1 or value.is_complex() or value.dtype is torch.bool:
        checks.refuse(TypeError, operator, argument, "a number or a tensor with one element", checks.describe(value))
    if value.device != device and value.device.type != "cpu":
        checks.refuse(ValueError, operator, argument, f"on {device} or the CPU", f"one on {value.device}")
    return value.detach().reshape(())


def normalizer(operator: str, value: Any, device: torch.device) -> Number:
    """What a sum is divided by: above 0, as far as the host sees."""
    found = one_number(operator, "normalizer", value, device)
    on_host = not isinstance(found, Tensor) or (found.device.type == "cpu" and not torch.compiler.is_compiling())
    if on_host and not found > 0:
        checks.refuse(ValueError, operator, "normalizer", "greater than 0", repr(value))
    return found

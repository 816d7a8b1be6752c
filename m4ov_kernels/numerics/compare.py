"""``certify``: log-probabilities of the same tokens from two programs, held against each other in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.numerics.certificate import Certificate, Group, Token

QUANTILES = (0.0, 0.01, 0.5, 0.99, 1.0)
CLASSES = ("no image before", "after image", "after video", "image or video")
_OP = "certify"
_TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def certify(
    rollout_logprobs: Tensor,
    train_logprobs: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_types: Tensor | None = None,
    position_bins: int | Sequence[int] = 8,
    quantiles: Sequence[float] = QUANTILES,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Certificate:
    """How far the trainer's log-probabilities are from those with which the tokens were sampled.

    With the same weights the two should be equal; what they differ by is a fault or a rounding, and reaches the loss as
    an importance ratio that is not 1.

    Args:
        rollout_logprobs, train_logprobs: ``[T]`` packed, or ``[B, T]`` with a sequence a row; any floating dtypes and
            devices (they are compared on the CPU in float64: this waits for a GPU). In nats, at most 0.
        mask: shaped as they are, bool or integer: the tokens that count (a response's, say). ``None``: all.
        cu_seqlens: ``[N + 1]`` int32 or int64, where in ``[T]`` each sequence begins, and the end. ``None``: one.
        token_types: shaped as they are, integers: 0 text, 1 image, 2 video, of *every* token of the sequences (of the
            prompt, too, where ``mask`` is false). Classes of tokens are made of them, :data:`CLASSES`: a token is
            "after image" or "after video" by the nearest token before it in its sequence that is of an image or a
            video, "no image before" if there is none, and "image or video" if it is one itself.
        position_bins: the number of bins of equal width up to the longest sequence; or where each begins, from 0. A
            token's position is its place among the tokens of its sequence that count, so that it depends neither on
            padding nor on packing nor on the length of a prompt that does not count.
        quantiles: of the ratio, each between 0 and 1.
        clip_low, clip_high: a token "would be clipped" where its ratio is below ``1 - clip_low`` or above
            ``1 + clip_high``. A loss clips on one side only, by the sign of the advantage, which is not known here.

    Returns:
        A :class:`Certificate`. A NaN is counted, named and kept out of all figures; an infinity is in them. Two values
        are identical if they are the same number (in different dtypes, too; ``-0.0`` is ``0.0``).

    Raises:
        TypeError: an argument is not of the kind above.
        ValueError: shapes do not fit, ``cu_seqlens`` does not lead from 0 to T, a log-probability is above 0 (0.01 is
            allowed, for roundings), or an option is out of range: names the argument.

    Source: k3 from http://joschu.net/blog/kl-approx.html; the clip range's default is DAPO's, arXiv 2503.14476.
    """
    _check_values(rollout_logprobs, train_logprobs)
    _check_options(quantiles, clip_low, clip_high)
    shape = train_logprobs.shape
    kept = torch.ones(shape.numel(), dtype=torch.bool) if mask is None else _flat("mask", mask, shape, bool) != 0
    starts = _starts(cu_seqlens, shape)
    rollout, train = (value.detach().cpu().double().reshape(-1) for value in (rollout_logprobs, train_logprobs))
    for name, values in (("rollout_logprobs", rollout), ("train_logprobs", train)):
        wrong = kept & (values > 0.01)
        if wrong.any():
            where = _token(wrong, starts, rollout, train)
            checks.refuse(ValueError, _OP, name, "at most 0, as logarithms of probabilities are", f"in {where}")
    nan = kept & (rollout.isnan() | train.isnan())
    sequence = _sequence(starts, train.numel())
    compared = _Compared(rollout, train, kept & ~nan, tuple(quantiles), clip_low, clip_high)
    classes: tuple[Group, ...] = ()
    if token_types is not None:
        kind = _classes(_flat("token_types", token_types, shape), starts[sequence])
        classes = tuple(compared.group(name, kind == number) for number, name in enumerate(CLASSES))
    total = compared.group("all", torch.ones_like(kept))
    position = kept.cumsum(0) - 1
    if position.numel():
        position = position - (position - kept.long() + 1)[starts[sequence]]
    edges = pairwise(_edges(position_bins, int(position[kept].max()) + 1 if kept.any() else 0))
    distance = torch.where(compared.kept, compared.delta.abs(), -1.0)
    return Certificate(
        total=total,
        positions=tuple(compared.bin(position, *edge) for edge in edges),
        classes=classes,
        sequences=int(sequence[kept].unique().numel()),
        quantiles=compared.quantiles,
        clip_low=float(clip_low),
        clip_high=float(clip_high),
        nan_rollout=int((kept & rollout.isnan()).sum()),
        nan_train=int((kept & train.isnan()).sum()),
        infinite=int((compared.kept & (rollout.isinf() | train.isinf())).sum()),
        worst=_token(distance == total.max_abs, starts, rollout, train) if total.identical < total.tokens else None,
        first_nan=_token(nan, starts, rollout, train) if nan.any() else None,
    )


_END = 2**62


@dataclass
class _Compared:
    """Flat float64 values, and which of them are compared."""

    rollout: Tensor
    train: Tensor
    kept: Tensor
    quantiles: tuple[float, ...]
    clip_low: float
    clip_high: float

    def __post_init__(self) -> None:
        # Where both are the same infinity, nothing differs.
        self.delta = torch.where(self.rollout == self.train, 0.0, self.train - self.rollout)

    def group(self, name: str, which: Tensor) -> Group:
        delta = self.delta[which & self.kept]
        count, nan = delta.numel(), math.nan
        if not count:
            return Group(name, 0, 0, nan, nan, nan, nan, (nan,) * len(self.quantiles), nan, nan)
        ratio, size = delta.exp(), delta.abs()
        k3 = torch.where(delta == math.inf, math.inf, delta.expm1() - delta)
        ordered = ratio.sort().values
        places = [max(math.ceil(quantile * count) - 1, 0) for quantile in self.quantiles]
        return Group(
            name,
            tokens=count,
            identical=int((delta == 0).sum()),
            max_abs=float(size.max()),
            mean_abs=float(size.mean()),
            mean=float(delta.mean()),
            k3=float(k3.mean()),
            quantiles=tuple(ordered[places].tolist()),
            clipped_low=int((ratio < 1 - self.clip_low).sum()) / count,
            clipped_high=int((ratio > 1 + self.clip_high).sum()) / count,
        )

    def bin(self, position: Tensor, first: int, end: int) -> Group:
        last = None if end == _END else end - 1
        found = self.group(
            f"from {first:,}" if last is None else f"{first:,} – {last:,}", (position >= first) & (position < end)
        )
        return replace(found, span=(first, last))


def _check_values(rollout_logprobs: Any, train_logprobs: Any) -> None:
    for name, value in (("rollout_logprobs", rollout_logprobs), ("train_logprobs", train_logprobs)):
        checks.float_tensor(_OP, name, value)
        if value.ndim not in (1, 2):
            checks.refuse(ValueError, _OP, name, "[T] or [B, T]", list(value.shape))
    if rollout_logprobs.shape != train_logprobs.shape:
        expected = f"{list(rollout_logprobs.shape)}, as rollout_logprobs"
        checks.refuse(ValueError, _OP, "train_logprobs", expected, list(train_logprobs.shape))


def _check_options(quantiles: Any, clip_low: Any, clip_high: Any) -> None:
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        checks.number(_OP, name, value)
        if not 0 <= value < math.inf:
            checks.refuse(ValueError, _OP, name, "a finite number, 0 or more", repr(value))
    for quantile in quantiles:
        checks.number(_OP, "quantiles", quantile)
        if not 0 <= quantile <= 1:
            checks.refuse(ValueError, _OP, "quantiles", "between 0 and 1", repr(quantile))


def _flat(name: str, value: Any, shape: torch.Size, *more: Any) -> Tensor:
    checks.index_tensor(_OP, name, value, (*_TYPES, *((torch.bool,) if more else ())))
    if value.shape != shape:
        checks.refuse(ValueError, _OP, name, f"{list(shape)}, as the log-probabilities", list(value.shape))
    return value.detach().cpu().reshape(-1)


def _starts(cu_seqlens: Any, shape: torch.Size) -> Tensor:
    """Where each sequence begins, int64 ``[N]``."""
    if cu_seqlens is None:
        if len(shape) == 2:
            return torch.arange(shape[0]) * shape[1]
        return torch.zeros(1, dtype=torch.int64)
    checks.index_tensor(_OP, "cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    if len(shape) == 2:
        checks.refuse(ValueError, _OP, "cu_seqlens", "None for [B, T]: each row is a sequence", list(cu_seqlens.shape))
    if cu_seqlens.ndim != 1 or not cu_seqlens.numel():
        checks.refuse(ValueError, _OP, "cu_seqlens", "[N + 1]", list(cu_seqlens.shape))
    bounds = cu_seqlens.detach().cpu().long()
    if bounds[0] != 0 or bounds[-1] != shape[0] or bool((bounds.diff() < 0).any()):
        expected = f"from 0 to the {shape[0]} tokens, never descending"
        checks.refuse(ValueError, _OP, "cu_seqlens", expected, bounds.tolist())
    return bounds[:-1]


def _sequence(starts: Tensor, tokens: int) -> Tensor:
    """The sequence of each token; of several that begin at the same place all but the last are empty."""
    return torch.searchsorted(starts, torch.arange(tokens), right=True) - 1


def _token(which: Tensor, starts: Tensor, rollout: Tensor, train: Tensor) -> Token:
    """The first of these tokens."""
    at = int(which.nonzero()[0])
    sequence = int(_sequence(starts, at + 1)[-1])
    return Token(sequence, at - int(starts[sequence]), float(rollout[at]), float(train[at]))


def _classes(types: Tensor, start: Tensor) -> Tensor:
    """Of each token, its place in :data:`CLASSES`. ``start``: where its sequence begins."""
    wrong = (types < 0) | (types > 2)
    if wrong.any():
        checks.refuse(ValueError, _OP, "token_types", "0, 1 or 2", f"{int(types[wrong][0])}")
    if not types.numel():
        return types.long()
    place = torch.arange(types.numel())
    nearest = torch.where(types != 0, place, -1).cummax(0).values
    before = torch.where(nearest >= start, types[nearest.clamp(min=0)].long(), 0)
    return torch.where(types != 0, 3, before)


def _edges(bins: Any, longest: int) -> list[int]:
    if isinstance(bins, bool) or not isinstance(bins, (int, Sequence)) or isinstance(bins, str):
        checks.refuse(TypeError, _OP, "position_bins", "an int, or a sequence of them", checks.describe(bins))
    if isinstance(bins, int):
        if bins < 1:
            checks.refuse(ValueError, _OP, "position_bins", "at least 1", repr(bins))
        width = max(-(-longest // bins), 1)
        return [*range(0, max(longest, 1), width), -(-max(longest, 1) // width) * width]
    edges = list(bins)
    if not edges or any(isinstance(edge, bool) or not isinstance(edge, int) for edge in edges):
        checks.refuse(TypeError, _OP, "position_bins", "an int, or a sequence of them", checks.describe(bins))
    if edges[0] != 0 or any(last <= first for first, last in pairwise(edges)):
        checks.refuse(ValueError, _OP, "position_bins", "ascending from 0", repr(edges))
    return [*edges, _END]

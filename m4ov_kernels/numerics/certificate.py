"""What :func:`m4ov_kernels.numerics.certify` found, as text, JSON and a plot."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Token:
    """A token, by its sequence and its place in that sequence (both from 0, as they were given), and its two values."""

    sequence: int
    place: int
    rollout: float
    train: float

    def __str__(self) -> str:
        return (
            f"sequence {self.sequence}, token {self.place}: {self.rollout:.6g} in rollout, {self.train:.6g} in training"
        )


@dataclass(frozen=True)
class Group:
    """Of some tokens, with Δ = train − rollout in nats and ratio = exp(Δ); in float64. NaN where there is no token.

    Attributes:
        name: which tokens.
        tokens: how many were compared.
        identical: how many of them have the same number on both sides.
        max_abs, mean_abs: of |Δ|.
        mean: of Δ; its sign says which side is surer.
        k3: mean of ratio − 1 − Δ, the unbiased and never negative estimate of KL(rollout ‖ train).
        quantiles: of the ratio, at the certificate's ``quantiles``; each is the ratio of some token.
        clipped_low, clipped_high: share of ratios below ``1 − clip_low``, above ``1 + clip_high``.
        span: of a bin of positions: the first, and the last (``None``: no last).
    """

    name: str
    tokens: int
    identical: int
    max_abs: float
    mean_abs: float
    mean: float
    k3: float
    quantiles: tuple[float, ...]
    clipped_low: float
    clipped_high: float
    span: tuple[int, int | None] | None = None


@dataclass(frozen=True)
class Certificate:
    """How far apart two programs are on the same tokens; ``str()`` is :meth:`text`.

    Attributes:
        total: over all tokens that were compared.
        positions: the same by the place of a token among those of its sequence that count.
        classes: the same by class of token; empty if no ``token_types`` were given.
        sequences: how many have a token that counts.
        quantiles, clip_low, clip_high: as asked for.
        nan_rollout, nan_train: how many tokens that count are NaN; they are in no figure.
        infinite: how many others are infinite on one side or both; they are in the figures.
        worst: the token with the largest |Δ|; ``None`` if all are identical.
        first_nan: the first token that is NaN on either side.
    """

    total: Group
    positions: tuple[Group, ...]
    classes: tuple[Group, ...]
    sequences: int
    quantiles: tuple[float, ...]
    clip_low: float
    clip_high: float
    nan_rollout: int
    nan_train: int
    infinite: int
    worst: Token | None
    first_nan: Token | None

    @property
    def identical(self) -> bool:
        """Whether there are tokens, and all have the same number on both sides; a NaN is the same as nothing."""
        return self.first_nan is None and 0 < self.total.tokens == self.total.identical

    def as_json(self) -> dict[str, Any]:
        """Dictionaries, lists, numbers and strings; what is not finite is ``None`` (NaN) or ``"inf"``, ``"-inf"``."""
        return _jsonable({"identical": self.identical, **asdict(self)})

    def verdict(self) -> str:
        """In words, a line for each thing to know."""
        total, lines = self.total, []
        if self.first_nan is not None:
            lines.append(
                f"NaN in {_count(self.nan_rollout, 'token')} of rollout and {_count(self.nan_train, 'token')} of"
                f" training, first in {self.first_nan}; what follows is of the other {total.tokens:,}"
            )
        if not total.tokens:
            lines.append("no token was compared")
        elif total.identical == total.tokens:
            where = f"{_count(total.tokens, 'token')} of {_count(self.sequences, 'sequence')}"
            lines.append(f"identical in all {where}")
        else:
            lines.append(
                f"{total.tokens - total.identical:,} of {_count(total.tokens, 'token')} differ: |Δ log-prob| at most"
                f" {total.max_abs:.3g}, {total.mean_abs:.3g} in the mean; k3 {total.k3:.3g};"
                f" {total.clipped_low + total.clipped_high:.3g} of them would be clipped"
            )
            lines.append(f"furthest apart in {self.worst}")
        if self.infinite:
            lines.append(f"{_count(self.infinite, 'token')} infinite on one side or both")
        return "\n".join(lines)

    def text(self) -> str:
        """The verdict and a table with a row for each group of tokens."""
        from rich import box
        from rich.console import Console
        from rich.table import Table

        low, high = f"< {1 - self.clip_low:g}", f"> {1 + self.clip_high:g}"
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        table.add_column("tokens")
        for name in ("count", "identical", "max |Δ|", "mean |Δ|", "mean Δ", "k3", low, high):
            table.add_column(name, justify="right")
        for quantile in self.quantiles:
            table.add_column(f"q{quantile:g}", justify="right")
        for groups in ((self.total,), self.positions, self.classes):
            for group in groups:
                counts = (f"{group.tokens:,}", f"{group.identical:,}")
                values = (group.max_abs, group.mean_abs, group.mean, group.k3, group.clipped_low, group.clipped_high)
                quantiles = [_number(value, 4) for value in group.quantiles]
                name = group.name if group.span is None else f"position {group.name}"
                table.add_row(name, *counts, *(_number(value, 3) for value in values), *quantiles)
            table.add_section()
        buffer = io.StringIO()
        Console(file=buffer, width=1000, color_system=None).print(table)  # as wide as it must be, nothing cut
        legend = (
            "Δ = train − rollout, in nats; ratio = exp(Δ): the share of them out of the clip range, and quantiles q"
        )
        return "\n".join((self.verdict(), "", *map(str.rstrip, buffer.getvalue().splitlines()), legend))

    def __str__(self) -> str:
        return self.text()

    def plot(self, path: str | Path) -> None:
        """Write a picture (the suffix says of which kind); needs matplotlib."""
        from m4ov_kernels.numerics.plot import draw

        draw(self).savefig(path, dpi=120)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}g}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _jsonable(inner) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_jsonable(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value

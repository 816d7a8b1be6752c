"""What a patch did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Replacement:
    """One part of a model that a patch replaced.

    Attributes:
        operator: the operator that serves it now, ``"rms_norm"``, ``"swiglu"``, …
        path: where in the model, e.g. ``"model.language_model.layers.0.mlp"``.
        was: what stood there before (a class, function or setting, by name).
        now: what stands there now.
    """

    operator: str
    path: str
    was: str
    now: str


@dataclass(frozen=True)
class PatchReport:
    """What :func:`~m4ov_kernels.patches.patch` or ``unpatch`` did to a model; iterates over the replacements.

    Attributes:
        model: class name of the model.
        replaced: what this call replaced.
        already: what an earlier call had replaced and this one found in place.
        skipped: operator or setting → why it was left as it is.
        restored: whether this is ``unpatch``'s report; ``replaced`` is then what it put back.
    """

    model: str
    replaced: tuple[Replacement, ...]
    already: tuple[Replacement, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    restored: bool = False

    def __iter__(self) -> Iterator[Replacement]:
        return iter(self.replaced)

    def __len__(self) -> int:
        return len(self.replaced)

    def __str__(self) -> str:
        summary = f"{len(self.replaced)} replaced, {len(self.already)} already in place"
        lines = [f"{self.model}: {f'{len(self.replaced)} restored' if self.restored else summary}"]
        for entries, note in ((self.replaced, ""), (self.already, " (already in place)")):
            counts = Counter((entry.operator, entry.was, entry.now) for entry in entries)
            lines += [
                f"  {operator:<22}{count:>4} × {was} → {now}{note}" for (operator, was, now), count in counts.items()
            ]
        lines += [f"  {name:<22}left as it is: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)

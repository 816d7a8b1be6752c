"""Two checkpoints held against each other, or one against itself: names, shapes, dtypes, hashes, what is not finite,
and the values of every weight, dequantised where it is quantised."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from m4ov.checkpoints import fold
from m4ov.checkpoints.folder import Checkpoint, Weight
from m4ov.checkpoints.seen import digest
from m4ov.checkpoints.values import row_ranges, rows_of
from m4ov.models.sharded import WeightsError
from m4ov_kernels.gemm.weights.bits import same

#: From best to worst. "same": every bit of values, codes and scales. "equal": the same values, held otherwise.
#: "rounded": one side is quantised, or of another dtype, or it differs within the tolerance.
#: "sound": there is no other side, and it is as its format has it, and finite.
VERDICTS = ("sound", "same", "equal", "rounded", "missing", "extra", "different", "shape", "not finite", "damaged")
_GOOD = VERDICTS[:4]


@dataclass(frozen=True)
class Row:
    """One tensor, or one quantised weight (all its tensors).

    Attributes:
        name: of the tensor, or of the module.
        verdict: one of ``VERDICTS``.
        detail: in words.
        error: ‖B − A‖/‖A‖, and
        largest: max |B − A|, where values were compared.
        hashes: full tensor name → SHA-256 of its bytes, of the first and of the second checkpoint.
    """

    name: str
    verdict: str
    detail: str = ""
    error: float | None = None
    largest: float | None = None
    hashes: tuple[dict[str, str], ...] = ()


@dataclass
class Comparison:
    """``digests``: of each checkpoint, over names, dtypes, shapes and values: the same however it is cut into files."""

    rows: list[Row] = field(default_factory=list)
    digests: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(row.verdict in _GOOD for row in self.rows)

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(row.verdict for row in self.rows)
        return {verdict: found[verdict] for verdict in VERDICTS if found[verdict]}


def verify(
    first: Checkpoint,
    second: Checkpoint | None = None,
    *,
    tolerance: float | None = None,
    advance: Callable[[int], object] = lambda done: None,
) -> Comparison:
    """Read everything. One checkpoint: every weight is as its format has it and finite. Two: that, and they are alike.

    Where one has a ``pre_quant_scale``, and the other is quantised and has none, the one is compared as it is folded.

    Args:
        tolerance: largest ‖B − A‖/‖A‖ of a weight; ``None``: what is quantised on one side alone, or has another dtype,
            may be off by anything, and all else must have the same values.
        advance: called with the bytes that were read, of both.
    """
    made = Comparison()
    sides = [first] if second is None else [first, second]
    foldings = [fold.Folding() for _ in sides]
    for place, side in enumerate(sides):
        other = sides[1 - place] if len(sides) > 1 else None
        if other is not None and _scaled(side) and other.modules and not _scaled(other):
            foldings[place] = fold.plan(side)
            what = f"the pre_quant_scale of {len(foldings[place].folded)} weights of {side.folder}"
            made.notes.append(f"{what} is folded here, as {other.folder} has none")
    hashed: list[dict[str, str]] = [{} for _ in sides]
    for name in _names(sides):
        row = _row(name, sides, foldings, tolerance)
        for every, own in zip(hashed, row.hashes, strict=False):
            every.update(own)
        made.rows.append(row)
        advance(sum(tensor.nbytes for side in sides for tensor in _tensors(side, name).values()))
    made.digests = tuple(_digest(side, every) for side, every in zip(sides, hashed, strict=True))
    return made


def _scaled(checkpoint: Checkpoint) -> bool:
    return any(key.endswith(".pre_quant_scale") for key in checkpoint.tensors)


def _names(sides: list[Checkpoint]) -> Iterator[str]:
    """Quantised modules by name, where either side is, other tensors by theirs; a tied head that one side leaves out
    is no difference."""
    modules = dict.fromkeys(name for side in sides for name in side.modules)
    yield from modules
    tied = all(side.tied for side in sides)
    for key in dict.fromkeys(key for side in sides for key in side.plain):
        module, _, leaf = key.rpartition(".")
        absent = not all(key in side.tensors for side in sides)
        if (module in modules and leaf == "weight") or (tied and absent and key == "lm_head.weight"):
            continue
        yield key


def _tensors(side: Checkpoint, name: str) -> dict[str, Any]:
    if name in side.modules:
        return dict(side.modules[name])
    return {key: side.plain[key] for key in (name, f"{name}.weight") if key in side.plain}


def _row(name: str, sides: list[Checkpoint], foldings: list[fold.Folding], tolerance: float | None) -> Row:
    hashes: list[dict[str, str]] = []
    values: list[Weight | Tensor | None] = []
    try:
        for side, folding in zip(sides, foldings, strict=True):
            tensors = _tensors(side, name)
            hashes.append({key: str(digest(tensor.read())) for key, tensor in tensors.items()})
            values.append(_read(side, name, folding) if tensors else None)
    except WeightsError as damage:
        return Row(name, "damaged", str(damage), hashes=tuple(hashes))
    for value in values:
        if value is not None and (count := _not_finite(value)):
            return Row(name, "not finite", f"{count} values are NaN or infinite", hashes=tuple(hashes))
    if len(values) == 1:
        return Row(name, "sound", _told(values[0]), hashes=tuple(hashes))
    a, b = values
    if a is None or b is None:
        verdict, how = ("extra", "only") if a is None else ("missing", "not")
        return Row(name, verdict, f"{how} in {sides[1].folder}", hashes=tuple(hashes))
    if tuple(a.shape) != tuple(b.shape):
        return Row(name, "shape", f"{list(a.shape)} and {list(b.shape)}", hashes=tuple(hashes))
    if _same(a, b):
        return Row(name, "same", _told(a), 0.0, 0.0, tuple(hashes))
    error, largest = distance(a, b)
    told = _told(a) if _kind(a) == _kind(b) else f"{_told(a)} and {_told(b)}"
    if largest == 0:
        verdict = "equal"
    elif tolerance is None:
        verdict = "different" if _kind(a) == _kind(b) else "rounded"
    else:
        verdict = "rounded" if error <= tolerance else "different"
    return Row(name, verdict, told, error, largest, tuple(hashes))


def _read(side: Checkpoint, name: str, folding: fold.Folding) -> Weight | Tensor:
    if name in side.modules:
        return folding.weight(name, side.read(name))
    key = name if name in side.plain else f"{name}.weight"
    return folding.tensor(key, side.plain[key].read())


def _not_finite(value: Weight | Tensor) -> int:
    """Of a quantised weight its reader has looked at scales and codes."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return 0
    flat = value.flatten()
    return sum(int((~torch.isfinite(part.float())).sum()) for part in flat.split(1 << 20))


def _same(a: Weight | Tensor, b: Weight | Tensor) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and same(a, b)
    return bool(a.equal(b))


def _kind(value: Weight | Tensor) -> tuple[type, torch.dtype]:
    return type(value), value.dtype if isinstance(value, Tensor) else value.scales.dtype


def _told(value: Weight | Tensor | None) -> str:
    if value is None:
        return ""
    kind = str(_kind(value)[1]).removeprefix("torch.")
    return kind if isinstance(value, Tensor) else f"{type(value).__name__}, {kind} scales"


def distance(a: Weight | Tensor, b: Weight | Tensor) -> tuple[float, float]:
    """(‖B − A‖/‖A‖, max |B − A|), in float64, a few rows at a time."""
    square = norm = largest = 0.0
    shape = tuple(a.shape)
    rows = shape[0] if shape else 1
    for begin, end in row_ranges(rows, math.prod(shape[1:])):
        one, other = _rows(a, begin, end), _rows(b, begin, end)
        off = (other - one).abs()
        square += float((off * off).sum())
        norm += float((one * one).sum())
        largest = max(largest, float(off.max()) if off.numel() else 0.0)
    return (math.sqrt(square / norm) if norm else (0.0 if square == 0 else math.inf)), largest


def _rows(value: Weight | Tensor, begin: int, end: int) -> Tensor:
    if not isinstance(value, Tensor):
        return rows_of(value, begin, end)
    return (value if value.dim() else value.reshape(1))[begin:end].double()


def _digest(side: Checkpoint, hashes: dict[str, str]) -> str:
    made = hashlib.sha256()
    for key, tensor in sorted(side.tensors.items()):
        known = hashes.get(key) or digest(tensor.read())
        made.update(f"{key} {tensor.dtype} {list(tensor.shape)} {known}\n".encode())
    return made.hexdigest()

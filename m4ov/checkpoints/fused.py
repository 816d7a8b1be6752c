"""Modules of which a server makes one product (q, k, v; gate, up): do their quantisations let it, and to what bits?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from m4ov.checkpoints.names import fused
from m4ov.checkpoints.seen import Seen
from m4ov_kernels.gemm.weights.fp8 import BLOCK


@dataclass(frozen=True)
class Mismatch:
    """Attributes:
    product: the name that the server has for it.
    breaks: it cannot be loaded, or computes something else; otherwise it is rounded once more.
    reason: in words.
    """

    product: str
    breaks: bool
    reason: str


def mismatches(seen: Mapping[str, Seen], plain: set[str]) -> list[Mismatch]:
    """What stands against joining modules.

    Args:
        seen: of the quantised ones, by name.
        plain: names of the linears that are not quantised.
    """
    found = []
    for product, names in fused([*seen, *plain]).items():
        parts = {name.rpartition(".")[2]: seen.get(name) for name in names}
        quantised = {own: part for own, part in parts.items() if part is not None}
        if not quantised:
            continue
        if len(quantised) < len(parts):
            left = [own for own, part in parts.items() if part is None]
            found.append(
                Mismatch(product, True, f"{', '.join(quantised)} quantised and {', '.join(left)} not: all or none")
            )
            continue
        found += [Mismatch(product, breaks, reason) for breaks, reason in _against(quantised)]
    return found


def _against(parts: Mapping[str, Seen]) -> Iterator[tuple[bool, str]]:
    def values(of: Callable[[Seen], object]) -> str | None:
        """Each part's value, where they differ."""
        given = {own: of(part) for own, part in parts.items()}
        return ", ".join(f"{own} {value}" for own, value in given.items()) if len(set(given.values())) > 1 else None

    differing = values(lambda part: (part.format, part.scheme))
    if differing is not None:
        told = ", ".join(f"{own}: {part.format}, {part.scheme}" for own, part in parts.items())
        yield True, f"of different schemes ({told})"
        return
    if (widths := values(lambda part: part.shape[1])) is not None:
        yield True, f"of different input widths ({widths})"
        return
    if values(lambda part: part.order) is not None:
        yield True, "of different act-orders (g_idx): the server keeps one of them for all"
    if values(lambda part: part.pre_quant_scale) is not None:
        yield True, "of different pre_quant_scale, and their input is one"
    first = next(iter(parts.values()))
    if first.fields.get("granularity") == "block":
        names = list(parts)
        uneven = [own for own in names[:-1] if parts[own].shape[0] % BLOCK]
        if uneven:
            sizes = ", ".join(f"{own} has {parts[own].shape[0]} outputs" for own in uneven)
            yield True, f"blocks of {BLOCK} would reach over the seam ({sizes})"
    scales = values(lambda part: part.scale)
    if scales is not None:
        given = [part.scale or 0.0 for part in parts.values()]
        ratio = max(given) / min(given) if min(given) > 0 else float("inf")
        yield (
            False,
            (
                f"one scale for each ({scales}): the server takes the largest and rounds the others anew, up to "
                f"{ratio:.3g} times coarser; `--to compressed-tensors-fp8 --granularity channel` keeps every value"
            ),
        )
    inputs = values(lambda part: part.input_scale)
    if inputs is not None:
        yield False, f"one input_scale for each ({inputs}): the server takes the largest for all"

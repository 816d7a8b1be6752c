"""What the patch of one model family consists of, and putting it on and taking it off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from m4ov_kernels.patches import loss
from m4ov_kernels.patches.attention import Hook, install, remove
from m4ov_kernels.patches.classes import Part, find_composed, find_swaps, name_of
from m4ov_kernels.patches.report import PatchReport, Replacement


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: as its makers write it.
        parts: the kinds of modules that are replaced, in the order of the report.
        attention: ``model → `` the halves whose attention is replaced, with their hooks; see
            :class:`~m4ov_kernels.patches.attention.Hook`.
    """

    name: str
    parts: tuple[Part, ...]
    attention: Callable[[Any], tuple[Hook, ...]]

    @property
    def operators(self) -> tuple[str, ...]:
        """Names of the operators that serve this family."""
        return tuple(dict.fromkeys([*(part.operator for part in self.parts), "varlen_attention"]))

    def patch(self, model: Any, operators: frozenset[str]) -> PatchReport:
        """Put the given operators in. All is checked before anything is changed."""
        skipped = [(name, "not asked for") for name in self.operators if name not in operators]
        parts = [part for part in self.parts if part.operator in operators]
        reason = loss.unfit(model)
        if loss.OPERATOR in operators and reason is not None:
            skipped.append((loss.OPERATOR, reason))
            parts = [part for part in parts if part.operator != loss.OPERATOR]
        found = find_swaps(parts, model.named_modules())
        for module, new_class in found.swaps:
            module.__class__ = new_class
        replaced, already, skipped = found.replaced, found.already, skipped + found.skipped
        if loss.OPERATOR in operators and reason is None:
            (already if loss.install(model) else replaced).append(loss.ENTRY)
        if "varlen_attention" in operators:
            install(model, self.attention(model), replaced, already, skipped)
        return PatchReport(type(model).__name__, tuple(replaced), tuple(already), tuple(skipped))

    def unpatch(self, model: Any) -> PatchReport:
        """Restore every class, hook and setting. All is checked before anything is changed."""
        operators = {part.front: part.operator for part in self.parts}
        restored = []
        for path, module in find_composed(model.named_modules()):
            kind: Any = type(module)
            restored += [
                Replacement(operators[front], path, f"m4ov_kernels.{front.__name__}", name_of(kind.original))
                for front in kind.fronts
            ]
            module.__class__ = kind.original
        if loss.remove(model):
            restored.append(Replacement(loss.OPERATOR, loss.ENTRY.path, loss.ENTRY.now, loss.ENTRY.was))
        restored += remove(model, self.attention(model))
        return PatchReport(type(model).__name__, tuple(restored), restored=True)

"""What every quantised weight keeps beside its tensors: the layouts for kernels that were made of them."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from m4ov_kernels.gemm.panels import Panels


class Cached:
    """A frozen dataclass of tensors with its :class:`Panels`, made when they are first asked for, and again after a
    tensor was changed in place. ``replace``, ``to``, copies and pickles leave them behind."""

    _panels: ClassVar[Panels | None] = None  # of an instance, once they are made
    _paired_panels: ClassVar[Panels | None] = None
    _versions: ClassVar[tuple[int, ...]] = ()

    def panels(self, *, paired: bool = False) -> Panels:
        """The layout that the compiled CPU kernels read, kept with this weight; see :class:`Panels`.

        Args:
            paired: of the rows ``[gate; up]``, panels of both by turns, as the epilogue ``"swiglu"`` needs them.
        """
        self._lay_out(paired)
        found = self._paired_panels if paired else self._panels
        assert found is not None
        return found

    def _lay_out(self, paired: bool) -> bool:
        versions = tuple(_version(value) for value in vars(self).values() if isinstance(value, Tensor))
        if versions != self._versions:
            for name in ("_panels", "_paired_panels"):
                vars(self).pop(name, None)
            object.__setattr__(self, "_versions", versions)
        name = "_paired_panels" if paired else "_panels"
        if name not in vars(self):
            from m4ov_kernels.gemm.panels import lay_out

            object.__setattr__(self, name, lay_out(self, paired=paired))
        return True

    # torch.compile runs it where it traces a call, and then reads (and guards) what it has left.
    _lay_out._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return summary(self)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def summary(value: Any) -> str:
    """A dataclass by its fields, of tensors dtype and shape."""
    parts = []
    for field in fields(value):
        part = getattr(value, field.name)
        if isinstance(part, Tensor):
            part = f"{str(part.dtype).removeprefix('torch.')} {list(part.shape)}"
        if part is not None:
            parts.append(f"{field.name}={part}")
    return f"{type(value).__name__}({', '.join(parts)})"

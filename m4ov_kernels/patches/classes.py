"""Replacing modules by giving them another class: nothing is added to an instance, and copies and pickles keep it.

The other class is *composed*: one or several fronts (modules of :mod:`m4ov_kernels.nn`, or adapters to transformers'
calls) stand before the module's own class, so that their methods come first. It keeps the name and module of the
class that it is made from (transformers finds a model's recorded outputs by them), and is pickled as what it is made
of.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import cache, wraps
from typing import Any, NamedTuple

from torch import nn

from m4ov_kernels.patches.report import Replacement


class Part(NamedTuple):
    """A kind of module that an operator's front is put before.

    Attributes:
        operator: name of the operator.
        kind: class of the module, exactly.
        front: class whose methods come first.
        where: pattern (``fnmatch``) of the module's path in the model.
        unfit: why a module of that kind must stay as it is, if so.
    """

    operator: str
    kind: type[nn.Module]
    front: type
    where: str = "*"
    unfit: Callable[[Any], str | None] = lambda module: None


class Swap(NamedTuple):
    """A module and the class that it is to have."""

    module: nn.Module
    new_class: type[nn.Module]


class Composed:
    """Base of composed classes."""

    original: type[nn.Module]
    fronts: tuple[type, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *rest = super().__reduce_ex__(protocol)  # type: ignore
        return (_new, (self.original, self.fronts), *rest)


def _new(original: type[nn.Module], fronts: tuple[type, ...]) -> nn.Module:
    kind = compose(original, fronts)  # type: ignore[arg-type]
    return kind.__new__(kind)


@cache
def compose(original: type[nn.Module], fronts: tuple[type, ...]) -> type[nn.Module]:
    """The class of ``original`` with ``fronts`` before it. A front with ``keeps_signature`` shows its forward with the
    signature of the original's (what a trainer or ``generate`` looks at)."""
    body: dict[str, Any] = {
        "original": original,
        "fronts": fronts,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    first: Any = next((front for front in fronts if hasattr(front, "forward")), None)
    if getattr(first, "keeps_signature", False):
        body["forward"] = _like(original.forward, first.forward)  # type: ignore[attr-defined]
    return type(original.__name__, (*fronts, Composed, original), body)


def _like(shown: Callable[..., Any], called: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(shown)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return called(self, *args, **kwargs)

    return forward


def parameters(method: Callable[..., Any]) -> tuple[str, ...]:
    """The names of what a method of a class takes, in order."""
    made = _PARAMETERS.get(method)
    if made is None:
        made = _PARAMETERS[method] = tuple(inspect.signature(method).parameters)[1:]
    return made


_PARAMETERS: dict[Callable[..., Any], tuple[str, ...]] = {}  # not functools.cache: torch.compile warns of that


def name_of(kind: type) -> str:
    """``transformers.Name``, ``torch.Name`` or ``m4ov_kernels.Name``."""
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"


class Found(NamedTuple):
    """What :func:`find_swaps` found."""

    swaps: list[Swap]
    replaced: list[Replacement]
    already: list[Replacement]
    skipped: list[tuple[str, str]]


def find_swaps(parts: Iterable[Part], modules: Iterable[tuple[str, nn.Module]]) -> Found:
    """What to swap among ``modules`` (path, module), its lines for the report, what already is in place, what stays.

    Raises:
        ValueError: a module was changed by something else: its forward was replaced on the instance, or it has a class
            derived from one that should be swapped or was.
    """
    parts = tuple(parts)
    found = Found([], [], [], [])
    for path, module in modules:
        original, fronts = _made_of(module)
        here = [part for part in parts if fnmatchcase(path, part.where)]
        if (isinstance(module, Composed) and not is_composed(module)) or any(
            issubclass(original, part.kind) and original is not part.kind for part in here
        ):
            raise ValueError(
                f"patch: {path or 'the model'} is a {type(module).__name__}; patch before fully_shard and before "
                "anything else that changes classes, and take the patch off in the reverse order"
            )
        wanted = []
        for part in here:
            if part.kind is not original:
                continue
            entry = Replacement(part.operator, path, name_of(original), f"m4ov_kernels.{part.front.__name__}")
            if part.front in fronts:
                found.already.append(entry)
            elif (reason := part.unfit(module)) is not None:
                if (part.operator, reason) not in found.skipped:
                    found.skipped.append((part.operator, reason))
            else:
                found.replaced.append(entry)
                wanted.append(part.front)
        if wanted:
            if "forward" in vars(module):
                raise ValueError(f"patch: the forward of {path or 'the model'} was replaced by something else already")
            found.swaps.append(Swap(module, compose(original, (*fronts, *dict.fromkeys(wanted)))))  # type: ignore
    return found


def find_composed(modules: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The modules (path, module) that are composed.

    Raises:
        ValueError: something else derived a class from a composed one.
    """
    found: list[tuple[str, nn.Module]] = [(path, part) for path, part in modules if isinstance(part, Composed)]
    for path, module in found:
        if not is_composed(module):
            raise ValueError(
                f"unpatch: {path or 'the model'} is a {type(module).__name__}; what was applied after the patch "
                "(fully_shard, …) must be taken off first"
            )
    return found


def is_composed(module: nn.Module) -> bool:
    """Whether the class of ``module`` is exactly a composed one."""
    return "fronts" in vars(type(module))


def _made_of(module: nn.Module) -> tuple[type[nn.Module], tuple[type, ...]]:
    """The class that a module has without the patch, and the fronts before it."""
    kind: Any = type(module)
    return (kind.original, kind.fronts) if is_composed(module) else (kind, ())

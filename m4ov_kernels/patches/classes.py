"""Replacing modules by giving them a subclass: nothing is added to an instance, and copies and pickles keep it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from m4ov_kernels.patches.report import Replacement


class Swap(NamedTuple):
    """A module, the class that it is to have, and the line for the report."""

    module: nn.Module
    new_class: type[nn.Module]
    entry: Replacement


def name_of(kind: type) -> str:
    """``transformers.Name``, ``torch.Name`` or ``m4ov_kernels.Name``: patched classes keep their names."""
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"


def find_swaps(
    group: str, modules: Iterable[tuple[str, nn.Module]], classes: Mapping[type, type]
) -> tuple[list[Swap], list[Replacement]]:
    """What to swap among ``modules`` (path, module), and what already is.

    Raises:
        ValueError: a module was changed by something else: its forward was replaced on the instance, or it has a class
            derived from one that should be swapped or was (as ``fully_shard`` makes them).
    """
    swaps, already = [], []
    originals = {new: old for old, new in classes.items()}
    for path, module in modules:
        kind = type(module)
        if kind in originals:
            already.append(Replacement(group, path, name_of(originals[kind]), name_of(kind)))
        elif kind in classes:
            if "forward" in vars(module):
                raise ValueError(f"patch: the forward of {path or 'the model'} was replaced by something else already")
            new = classes[kind]
            swaps.append(Swap(module, new, Replacement(group, path, name_of(kind), name_of(new))))
        elif isinstance(module, tuple(classes)):
            raise ValueError(
                f"patch: {path or 'the model'} is a {kind.__name__}; patch before fully_shard and before anything else "
                "that changes classes, and take the patch off in the reverse order"
            )
    return swaps, already


def apply(swaps: Iterable[Swap]) -> None:
    for module, new_class, _ in swaps:
        module.__class__ = new_class

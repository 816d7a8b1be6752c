"""Trees of labels: read from YAML, checked whole, and never changed in place."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from m4ov.data.labels.label import Label, LabelError, near, normalised
from m4ov.data.labels.reading import LEVELS, parse_tree
from m4ov.data.records import short
from m4ov.data.whole import write_whole

SHIPPED = ("topics", "capabilities")
_ID = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*")


@dataclass(frozen=True)
class LabelTree:
    """Labels in ``levels`` levels, broad to fine. Every branch reaches the last level, whose labels are the leaves.

    Args:
        name: of the tree.
        labels: in any order; kept depth first, in the order in which siblings come.
        levels: how many.
        source: the file, for messages.

    Raises:
        LabelError: an id is malformed or stands twice, a parent is missing, labels are their own ancestors, a branch
            ends early or goes on too long, siblings have one title, or a title or description is missing.
    """

    name: str
    labels: tuple[Label, ...]
    levels: int = LEVELS
    source: str = field(default="", compare=False)
    _paths: dict[str, tuple[str, ...]] = field(init=False, repr=False, compare=False)
    _children: dict[str, tuple[Label, ...]] = field(init=False, repr=False, compare=False)
    _of_id: dict[str, Label] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or not 1 <= self.levels <= 8:
            raise LabelError(f"{self._where()}: levels must be 1 to 8, got {short(self.levels)}")
        if not self.labels:
            raise LabelError(f"{self._where()}: no label")
        for label in self.labels:
            self._check(label)
        of_id = {label.id: label for label in self.labels}
        children: dict[str, list[Label]] = {}
        for label in self.labels:
            if label.parent and label.parent not in of_id:
                raise LabelError(
                    f"{self._where(label)}: its parent {label.parent!r} is not in the tree{near(label.parent, of_id)}"
                )
            children.setdefault(label.parent, []).append(label)
        paths = self._walk(children)
        for label in self.labels:
            if label.id not in paths:
                raise LabelError(
                    f"{self._where(label)}: it is its own ancestor: {' → '.join(_circle(label.id, of_id))}"
                )
        object.__setattr__(self, "labels", tuple(of_id[id] for id in paths))
        object.__setattr__(self, "_paths", paths)
        object.__setattr__(self, "_children", {id: tuple(below) for id, below in children.items()})
        object.__setattr__(self, "_of_id", of_id)

    def _check(self, label: Label) -> None:
        where = self._where(label)
        if not isinstance(label.id, str) or not _ID.fullmatch(label.id) or len(label.id) > 500:
            raise LabelError(
                f"{where}: id must be lower-case letters and digits, joined by . - or _, got {short(label.id)}"
            )
        for name, value in (("title", label.title), ("about", label.about)):
            if not isinstance(value, str) or not value.strip() or not value.isprintable():
                raise LabelError(f"{where}: {name} must be one line of text, got {short(value)}")
        if not isinstance(label.parent, str) or not isinstance(label.vertical, bool):
            got = f"{short(label.parent)} and {short(label.vertical)}"
            raise LabelError(f"{where}: parent must be an id and vertical true or false, got {got}")
        if label.vertical and label.parent:
            raise LabelError(f"{where}: vertical is said of the broadest labels only")

    def _walk(self, children: dict[str, list[Label]]) -> dict[str, tuple[str, ...]]:
        """Paths of all labels that can be reached from the top, depth first; checks what depends on depth."""
        twice = [id for id, count in Counter(label.id for label in self.labels).items() if count > 1]
        if twice:
            again = [label for label in self.labels if label.id == twice[0]][1]
            raise LabelError(f"{self._where(again)}: the id stands twice")
        paths: dict[str, tuple[str, ...]] = {}
        waiting: list[tuple[Label, tuple[str, ...]]] = [
            (label, (label.id,)) for label in reversed(children.get("", []))
        ]
        while waiting:
            label, path = waiting.pop()
            paths[label.id] = path
            below = children.get(label.id, [])
            if len(path) == self.levels and below:
                where = self._where(below[0])
                raise LabelError(
                    f"{where}: level {len(path) + 1}, below {label.id!r}; the tree has {self.levels} levels"
                )
            if len(path) < self.levels and not below:
                where = self._where(label)
                raise LabelError(f"{where}: an empty branch: level {len(path)} of {self.levels}, and nothing below it")
            waiting += [(child, (*path, child.id)) for child in reversed(below)]
        for siblings in children.values():
            titles: dict[str, Label] = {}
            for label in siblings:
                other = titles.setdefault(normalised(label.title), label)
                if other is not label:
                    raise LabelError(
                        f"{self._where(label)}: {other.id!r} beside it has the same title, {label.title!r}"
                    )
        return paths

    def _where(self, label: Label | None = None) -> str:
        place = self.source or f"tree {self.name!r}"
        if label is None:
            return place
        return f"{place}{f', line {label.line}' if label.line else ''}: label {short(label.id)}"

    def __contains__(self, id: object) -> bool:
        return id in self._of_id

    def __getitem__(self, id: str) -> Label:
        if id not in self._of_id:
            raise LabelError(f"{self._where()}: no label {short(id)}{near(id, self._of_id)}")
        return self._of_id[id]

    @property
    def leaves(self) -> tuple[str, ...]:
        """Ids of the finest labels, depth first."""
        return self.at_level(self.levels)

    @property
    def verticals(self) -> tuple[str, ...]:
        """Ids of the broadest labels that are vertical domains."""
        return tuple(label.id for label in self.labels if label.vertical)

    def at_level(self, level: int) -> tuple[str, ...]:
        """Ids of the labels of one level, from 1, depth first."""
        if not 1 <= level <= self.levels:
            raise LabelError(f"{self._where()}: levels are 1 to {self.levels}, got {level}")
        return tuple(id for id, path in self._paths.items() if len(path) == level)

    def path(self, id: str) -> tuple[str, ...]:
        """Ids from the broadest label to this one: ``(L1, L2, L3)`` for a leaf of three levels."""
        return self._paths[self[id].id]

    def titles(self, id: str) -> tuple[str, ...]:
        """The titles along :meth:`path`."""
        return tuple(self[part].title for part in self.path(id))

    def children(self, id: str = "") -> tuple[Label, ...]:
        """The labels right below one, or the broadest."""
        if id:
            self[id]  # named if it is not there
        return self._children.get(id, ())

    def problem(self, path: Sequence[str]) -> str:
        """What is wrong with the path of a record; empty if it is one of this tree, down to a leaf."""
        unknown = [id for id in path if id not in self]
        if unknown:
            return f"no label {short(unknown[0])}{near(unknown[0], self._of_id)}"
        if len(path) != self.levels:
            return f"{len(path)} levels instead of {self.levels}"
        if tuple(path) != self._paths[path[-1]]:
            return (
                f"{path[-1]!r} stands under {' / '.join(self._paths[path[-1]][:-1])}, not under {' / '.join(path[:-1])}"
            )
        return ""

    def extended(self, labels: Sequence[Label]) -> LabelTree:
        """A tree that has these labels too."""
        return replace(self, labels=(*self.labels, *labels))

    def to_yaml(self) -> str:
        """The tree as a file has it."""

        def branch(label: Label) -> dict[str, Any]:
            value: dict[str, Any] = {"id": label.id, "title": label.title, "about": label.about}
            if label.vertical:
                value["vertical"] = True
            if self.children(label.id):
                value["children"] = [branch(child) for child in self.children(label.id)]
            return value

        value = {"name": self.name, "levels": self.levels, "labels": [branch(label) for label in self.children()]}
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=118)

    def save(self, path: str | Path) -> None:
        """Write it as YAML, whole or not at all; :meth:`load` gives the same tree.

        Raises:
            WriteError: it cannot be written.
        """
        write_whole(path, self.to_yaml())

    @classmethod
    def load(cls, name_or_path: str | Path) -> LabelTree:
        """A tree that comes with the package (``"topics"``, ``"capabilities"``), or one in a YAML file.

        The file has ``name``, ``levels`` (3 if it is not said) and ``labels``: a list of ``{id, title, about}`` with
        ``children``, or with ``parent``, the id of another label of the file, where nesting is inconvenient.

        Raises:
            LabelError: there is no such file, or it is not such a tree; names line and label.
        """
        shipped = str(name_or_path) in SHIPPED
        path = resources.files("m4ov.data.labels") / f"{name_or_path}.yaml" if shipped else Path(name_or_path)
        source = f"{name_or_path}.yaml" if shipped else str(name_or_path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            hint = "" if shipped or Path(name_or_path).suffix else f"; trees of the package: {', '.join(SHIPPED)}"
            raise LabelError(f"{source}: {error.strerror}{hint}") from error
        except UnicodeDecodeError as error:
            raise LabelError(f"{source}: not UTF-8 ({error.reason} at byte {error.start})") from None
        return cls.from_yaml(text, source)

    @classmethod
    def from_yaml(cls, text: str, source: str = "the text") -> LabelTree:
        """A tree from the text of a file; see :meth:`load`."""
        name, levels, labels = parse_tree(text, source)
        return cls(name, labels, levels, source)


def _circle(start: str, of_id: dict[str, Label]) -> list[str]:
    """The circle that the ancestors of a label end in."""
    chain = [start]
    while (parent := of_id[chain[-1]].parent) not in chain:
        chain.append(parent)
    return [*chain[chain.index(parent) :], parent]


@lru_cache
def topics() -> LabelTree:
    """The tree of topics that comes with the package: a general tree and vertical domains."""
    return LabelTree.load("topics")


@lru_cache
def capabilities() -> LabelTree:
    """The tree of capabilities that comes with the package."""
    return LabelTree.load("capabilities")

"""Labels in YAML: plain values that know their lines; what YAML allows and a tree may not have is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from m4ov.data.labels.label import Label, LabelError
from m4ov.data.records import short

LEVELS = 3  # of a file that does not say how many
_KEYS = ("id", "title", "about", "parent", "vertical", "children")
_MAX_NESTING = 32  # of YAML; three levels of labels need eight
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LINE = "\0line"  # no key of a YAML file


def parse_tree(text: str, source: str) -> tuple[str, int, tuple[Label, ...]]:
    """Name, number of levels and labels of a file, not yet checked as a tree.

    Raises:
        LabelError: it is not YAML, or not of that form; names line and label.
    """
    value = _Lines(text, source).value
    if not isinstance(value, dict) or not isinstance(value.get("labels"), list):
        raise LabelError(f"{source}: expected a mapping with name and a list of labels, got {short(value)}")
    _known(value, ("name", "levels", "labels"), source)
    name = value.get("name")
    if not isinstance(name, str) or not name.strip():
        raise LabelError(f"{source}: name must be text, got {short(name)}")
    return name, value.get("levels", LEVELS), tuple(_flattened(value["labels"], "", source))


def _flattened(entries: list[Any], parent: str, source: str) -> Iterator[Label]:
    for entry in entries:
        if not isinstance(entry, dict):
            raise LabelError(
                f"{source}: expected labels with id, title and about below {parent or 'labels'!r}, got {short(entry)}"
            )
        line = entry[_LINE]
        where = f"{source}, line {line}: label {short(entry.get('id'))}"
        _known(entry, (*_KEYS, _LINE), where)
        missing = [name for name in _KEYS[:3] if name not in entry]
        if missing:
            raise LabelError(f"{where}: no {missing[0]}")
        if parent and "parent" in entry:
            raise LabelError(
                f"{where}: parent {short(entry['parent'])} is said of a label that stands below {parent!r}"
            )
        below = entry.get("children", [])
        if not isinstance(below, list):
            raise LabelError(f"{where}: children must be a list, got {short(below)}")
        vertical = entry.get("vertical", False)
        yield Label(entry["id"], entry["title"], entry["about"], entry.get("parent", parent), vertical, line)
        yield from _flattened(below, entry["id"], source)


class _Lines:
    """A YAML text as plain values, whose mappings know their lines; no aliases, no key twice, no deep nesting."""

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        try:
            self._guard(text)
            root = yaml.compose(text, Loader=_LOADER)
        except (yaml.YAMLError, UnicodeError) as error:
            mark = getattr(error, "problem_mark", None)
            place = f"{source}, line {mark.line + 1}" if mark else source
            raise LabelError(f"{place}: not YAML ({getattr(error, 'problem', None) or error})") from None
        self._construct = yaml.SafeLoader("")
        self.value = self._plain(root) if root is not None else None
        if isinstance(self.value, dict):
            self.value.pop(_LINE)

    def _guard(self, text: str) -> None:
        """Events come without recursion, so they are looked at before anything recursive is done."""
        depth = 0
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.AliasEvent):
                raise LabelError(f"{self._at(event)}: an alias (*{event.anchor}); write the label out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_NESTING:
                raise LabelError(f"{self._at(event)}: nested more than {_MAX_NESTING} deep")

    def _at(self, item: Any) -> str:
        return f"{self.source}, line {item.start_mark.line + 1}"

    def _plain(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(entry) for entry in node.value]
        if not isinstance(node, yaml.MappingNode):
            try:
                return self._construct.construct_object(node)
            except (yaml.YAMLError, ValueError) as error:
                raise LabelError(f"{self._at(node)}: {getattr(error, 'problem', None) or error}") from None
        value: dict[Any, Any] = {_LINE: node.start_mark.line + 1}
        for key_node, value_node in node.value:
            key = self._plain(key_node)
            if not isinstance(key, str) or key == _LINE:
                raise LabelError(f"{self._at(key_node)}: a key must be a name, got {short(key)}")
            if key in value:
                raise LabelError(f"{self._at(key_node)}: {key} stands twice")
            value[key] = self._plain(value_node)
        return value


def _known(value: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    unknown = [name for name in value if name not in names]
    if unknown:
        shown = ", ".join(name for name in names if name != _LINE)
        raise LabelError(f"{where}: unknown key {short(unknown[0])}; valid here: {shown}")

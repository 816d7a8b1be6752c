"""Recipes: one tree of dataclasses, filled from a YAML file and dotted overrides; nothing unknown is let through.

A task declares its tree as plain dataclasses with defaults. OmegaConf reads the file, merges and converts; this module
adds what a user sees when a key or value is wrong: where it stands, its full dotted name, and the nearest valid one.
No torch here.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


class ConfigError(ValueError):
    """A recipe or an override is wrong; the message is one line for the user."""


def recipes() -> dict[str, Path]:
    """The recipes that come with the package: name → file."""
    folder = resources.files("m4ov") / "recipes"
    if not folder.is_dir():
        return {}
    files = (Path(str(entry)) for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {file.stem: file for file in sorted(files)}


def find(recipe: str) -> Path:
    """The file of a recipe given by name or by path.

    Raises:
        ConfigError: there is none; lists the recipes and names the nearest.
    """
    known = recipes()
    if recipe in known:
        return known[recipe]
    path = Path(recipe)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        problem = "is a folder, not a recipe" if path.is_dir() else "no such file"
        raise ConfigError(f"recipe {recipe}: {problem}")
    close = difflib.get_close_matches(recipe, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(
        f"no recipe is named {recipe!r}{hint}; recipes: {', '.join(known) or 'none'} (or give the path of a .yaml file)"
    )


def load(schema: type[T], recipe: str | Path, overrides: Sequence[str] = ()) -> T:
    """The configuration ``schema`` (a dataclass), filled from the file of ``recipe`` and then from ``overrides``.

    Args:
        schema: dataclass whose fields all have defaults; nested dataclasses, lists and dicts of them, optionals, enums.
        recipe: a name from :func:`recipes` or a path.
        overrides: ``key.subkey=value``, the value in YAML.

    Raises:
        ConfigError: unreadable file, unknown key, value of a wrong type, or a value that ``__post_init__`` refuses.
    """
    path = find(str(recipe))
    config = OmegaConf.structured(schema)
    for source, values in [(str(path), read(path)), *(_override(item) for item in overrides)]:
        _check(schema, OmegaConf.to_container(values), source)
        try:
            config = OmegaConf.merge(config, values)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{source}: {_explain(schema, error)}") from error
    try:
        loaded = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_explain(schema, error)}") from error
    except (ValueError, TypeError) as error:  # from a __post_init__
        raise ConfigError(f"{path}: {error}") from error
    return typing.cast(T, loaded)


def read(path: Path) -> DictConfig:
    """The mapping in a YAML file, unchecked; an empty file is an empty mapping."""
    try:
        values = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except Exception as error:  # yaml errors, duplicate keys, undecodable bytes: all are about the file's text
        raise ConfigError(f"{path}: not a YAML mapping: {' '.join(str(error).split())}") from error
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of keys to values at the top, got a {type(values).__name__}")
    return values


def _override(item: str) -> tuple[str, DictConfig]:
    key, equals, _ = item.partition("=")
    if not equals or not all(part.isidentifier() for part in key.split(".")):
        raise ConfigError(f"override {item!r}: expected key=value or key.subkey=value")
    try:
        return f"override {item!r}", OmegaConf.from_dotlist([item])
    except Exception as error:
        raise ConfigError(f"override {item!r}: the value is not YAML: {' '.join(str(error).split())}") from error


def _check(schema: type, values: Any, source: str, prefix: str = "", root: type | None = None) -> None:
    """Refuse unknown keys, and what OmegaConf would convert in silence (1.5 or true to an int, 3 to a bool)."""
    fields = _fields(schema)
    for name, value in values.items():
        key = prefix + name
        if name not in fields:
            raise ConfigError(f"{source}: unknown key {key}{_hint(root or schema, name, prefix, list(fields))}")
        hint, inner = fields[name], _dataclass_in(fields[name])
        if inner is None:
            kinds = {argument for argument in (hint, *typing.get_args(hint)) if argument in (int, bool)}
            wrong = kinds == {int} and (isinstance(value, bool) or (isinstance(value, float) and value % 1))
            if wrong or (kinds == {bool} and isinstance(value, (int, float)) and not isinstance(value, bool)):
                raise ConfigError(f"{source}: {key}: expected {_type_name(hint)}, got {value!r}")
            continue
        many = typing.get_origin(hint) if typing.get_origin(hint) in (list, dict) else None
        for place, item in _items(value) if many and isinstance(value, many) else [(None, value)]:
            where = key if place is None else f"{key}.{place}"
            if isinstance(item, dict) and (many is not dict or place is not None):
                _check(inner, item, source, f"{where}.", root or schema)
            elif item is not None or many:
                several = "a list of mappings" if many is list else "a mapping of mappings"
                wanted = several if many and place is None else "a mapping"
                raise ConfigError(f"{source}: {where}: expected {wanted} ({inner.__name__}), got {item!r}")


def _items(value: list[Any] | dict[str, Any]) -> Iterable[tuple[Any, Any]]:
    return value.items() if isinstance(value, dict) else enumerate(value)


def _hint(root: type, name: str, prefix: str, siblings: list[str]) -> str:
    """The valid key whose last part is most like the wrong one; of equals, the one that stands beside it."""
    candidates = [prefix + sibling for sibling in siblings] + [key for key, _ in keys(root)]

    def likeness(key: str) -> float:
        place, _, last = key.rpartition(".")
        return difflib.SequenceMatcher(None, name, last).ratio() + 0.05 * (f"{place}." * bool(place) == prefix)

    best = max(candidates, key=likeness)
    return f"; did you mean {best}?" if likeness(best) > 0.65 else f"; valid here: {', '.join(siblings)}"


def keys(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a dataclass tree with its type."""
    for name, hint in _fields(schema).items():
        yield prefix + name, hint
        inner = _dataclass_in(hint)
        if inner is not None and typing.get_origin(hint) not in (list, dict):
            yield from keys(inner, f"{prefix}{name}.")


def _explain(schema: type, error: OmegaConfBaseException) -> str:
    """OmegaConf's error in one line: the key, the type wanted, what came."""
    message = str(getattr(error, "msg", None) or error).strip().splitlines()[0]
    key = getattr(error, "full_key", None)
    expected = dict(keys(schema)).get(key or "")
    if expected is not None:
        return f"{key}: expected {_type_name(expected)}; {message}"
    return f"{key}: {message}" if key else message


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _fields(schema: type) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema) if field.init}


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass of a field: itself, optional, or the element of a list or a mapping."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    if typing.get_origin(hint) in (typing.Union, types.UnionType, list, dict):
        return next((found for found in map(_dataclass_in, typing.get_args(hint)) if found), None)
    return None


def task(path: Path, overrides: Sequence[str] = ()) -> str | None:
    """The ``task`` that a recipe's file and overrides name, which says what configuration the rest must fit."""
    named = [values.get("task") for values in (read(path), *(_override(item)[1] for item in overrides))]
    return next((str(value) for value in reversed(named) if value is not None), None)

"""Which configuration a kernel is launched with.

``<architecture>.json`` beside this file holds the rows that ``m4ov kernels tune`` measured on that architecture;
``default.json`` serves every other (kernel, dtype). A row is chosen by the width of the problem (the hidden size, never
a number of tokens, so that a row's bits do not depend on its batch and no new batch shape compiles anything): the first
whose ``width`` is not below it. Nothing is measured at import or in a call.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from m4ov_kernels import gpu
from m4ov_kernels.gpu import Config

DEFAULT = "default"
FOLDER = Path(__file__).resolve().parent
_ANY = "any"
_FIELDS = {"kernel", "dtype", "width", "blocks", "num_warps", "num_stages"}


@dataclass(frozen=True)
class Row:
    """The configuration of ``kernel`` for ``dtype`` (``"bf16"``, ``"fp16"``, ``"fp32"`` or ``"any"``) at widths of at
    most ``width`` elements (``None``: any)."""

    kernel: str
    dtype: str
    width: int | None
    config: Config


@dataclass(frozen=True)
class Table:
    """``measured``: GPU, driver, versions and date of the measurement; empty for the default, which nobody measured."""

    measured: Mapping[str, str]
    rows: tuple[Row, ...]


_overrides: list[tuple[Row, ...]] = []


def find(kernel: str, tensor: Tensor, width: int) -> Config | None:
    """The configuration of ``kernel`` on the device and for the dtype of ``tensor`` (of integers, that for any dtype);
    ``None``: wider than every row.
    Raises ``ValueError`` for a kernel that no table knows."""
    return _lookup(kernel, gpu.architecture(tensor.device), gpu.DTYPES.get(tensor.dtype, _ANY), width)


def get(kernel: str, tensor: Tensor, width: int | None = None) -> Config:
    """As :func:`find`, for a kernel that has a row without a bound, which ``width=None`` asks for."""
    config = _lookup(kernel, gpu.architecture(tensor.device), gpu.DTYPES.get(tensor.dtype, _ANY), width)
    if config is None:
        raise ValueError(f"kernel: {kernel!r} has no row without a bound")
    return config


@lru_cache(maxsize=4096)
def _lookup(kernel: str, architecture: str, dtype: str, width: int | None) -> Config | None:
    for row in rows_of(kernel, architecture, dtype):
        if row.width is None or (width is not None and width <= row.width):
            return row.config
    return None


def rows_of(kernel: str, architecture: str, dtype: str) -> list[Row]:
    """The rows in force, narrowest first: overriding ones, else the architecture's, else the default's."""
    tables = [*reversed(_overrides), table(architecture).rows, table(DEFAULT).rows]
    for rows in tables:
        for wanted in (dtype, _ANY):
            found = [row for row in rows if row.kernel == kernel and row.dtype == wanted]
            if found:
                return found
    raise ValueError(f"kernel: no table has a configuration of {kernel!r} for {dtype}")


def shipped(kernel: str, dtype: str) -> list[tuple[Row, tuple[str, ...]]]:
    """Every row that ships for ``kernel`` and ``dtype``, with the architectures that it is in force on."""
    found: dict[str, tuple[Row, list[str]]] = {}
    for architecture in gpu.ARCHITECTURES:
        for row in rows_of(kernel, architecture, dtype):
            found.setdefault(repr(row), (row, []))[1].append(architecture)
    return [(row, tuple(architectures)) for row, architectures in found.values()]


@contextmanager
def override(*rows: Row) -> Iterator[None]:
    """Puts ``rows`` in front of every table, for their kernels and dtypes, in all threads of this process."""
    _check("override", rows)
    _overrides.append(rows)
    _lookup.cache_clear()
    try:
        yield
    finally:
        _overrides.remove(rows)
        _lookup.cache_clear()


@lru_cache
def table(architecture: str) -> Table:
    """The table that ships for ``architecture``; without rows where none does."""
    path = FOLDER / f"{architecture}.json"
    return read(path) if path.exists() else Table({}, ())


def forget() -> None:
    """Read the tables again when they are next asked for."""
    table.cache_clear()
    _lookup.cache_clear()


def read(path: Path) -> Table:
    """Raises ``ValueError`` that names the file and the row which is not one."""
    data = json.loads(path.read_text())
    rows = []
    for number, entry in enumerate(data["rows"]):
        if set(entry) != _FIELDS:
            raise ValueError(f"{path.name}: row {number}: expected {', '.join(sorted(_FIELDS))}; got {entry}")
        config = Config(entry["blocks"], entry["num_warps"], entry["num_stages"])
        rows.append(Row(entry["kernel"], entry["dtype"], entry["width"], config))
    _check(path.name, rows)
    return Table(data["measured"], tuple(rows))


def write(path: Path, table: Table) -> None:
    """One line per row, so that a change is a readable difference; whole or not at all."""
    _check(path.name, table.rows)
    lines = [json.dumps(_entry(row)) for row in table.rows]
    text = f'{{"measured": {json.dumps(dict(table.measured))},\n"rows": [\n' + ",\n".join(lines) + "\n]}\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _entry(row: Row) -> dict[str, Any]:
    config = row.config
    place = {"kernel": row.kernel, "dtype": row.dtype, "width": row.width}
    return {
        **place,
        "blocks": dict(config.constexprs),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _check(source: str, rows: Sequence[Row]) -> None:
    before: dict[tuple[str, str], Row] = {}
    for row in rows:
        config, problem = row.config, ""
        if row.dtype not in (*gpu.SIZES, _ANY):
            problem = f"dtype: expected one of {', '.join(gpu.SIZES)}, {_ANY}; got {row.dtype!r}"
        elif not _power_of_two(config.num_warps) or config.num_warps > 32:
            problem = f"num_warps: expected a power of two up to 32, got {config.num_warps!r}"
        elif not all(_power_of_two(size) for size in config.constexprs.values()):
            problem = f"blocks: expected powers of two, got {dict(config.constexprs)}"
        elif not isinstance(config.num_stages, int) or config.num_stages < 1:
            problem = f"num_stages: expected at least 1, got {config.num_stages!r}"
        last = before.get((row.kernel, row.dtype))
        if last and (last.width is None or (row.width is not None and row.width <= last.width)):
            problem = f"width: expected more than the {last.width} of the row before, got {row.width}"
        before[row.kernel, row.dtype] = row
        if problem:
            raise ValueError(f"{source}: {row.kernel} {row.dtype} {row.width}: {problem}")


def _power_of_two(value: Any) -> bool:
    return isinstance(value, int) and value > 0 and value & (value - 1) == 0

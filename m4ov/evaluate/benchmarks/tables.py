"""The benchmarks' published files: which they are, and their rows."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from m4ov.data.pictures import to_uri
from m4ov.data.records import RecordError, Where, short
from m4ov.data.shards import read_values
from m4ov.evaluate.benchmarks.base import Benchmark

_FIELD_BYTES = 2**30  # of a TSV: an image in base64
_DEPTH = 3  # folders below --data
_NUMBERED = re.compile(r"-(?P<index>\d{5})-of-(?P<count>\d{5})")
_REFERENCE = 64  # a shorter image field is the index of the row that has the image (the TSVs' own rule)


def find(benchmark: Benchmark, data: Path) -> list[Path]:
    """A benchmark's files.

    Args:
        data: a file, or a folder in or below which a path names the benchmark (``MMBench_DEV_EN.tsv``,
            ``MathVista/data/testmini-00000-of-00001.parquet``). Where there are several, those of ``benchmark.split``.

    Raises:
        ValueError: there is none, or several that are not the shards of one table.
        RecordError: a shard is missing.
    """
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise ValueError(f"--data: {data}: no such file or folder")
    expected = f"one of *{', *'.join(benchmark.suffixes)} whose path has {' or '.join(benchmark.names)} in it"
    there = [path for depth in range(_DEPTH) for path in sorted(data.glob("/".join(["*"] * (depth + 1))))]
    fitting = [path for path in there if path.is_file() and path.suffix in benchmark.suffixes]
    own = [path for path in fitting if _named(benchmark, path.relative_to(data).parts)]
    if not own and _named(benchmark, (data.resolve().name,)):
        own = fitting
    if len(_tables(own)) > 1:
        own = [path for path in own if benchmark.split in re.split(r"[^a-z0-9]+", path.stem.lower())] or own
    tables = _tables(own)
    if not tables:
        raise ValueError(f"--data: {benchmark.name}: expected {expected}; {data} has none")
    if len(tables) > 1:
        names = ", ".join(str(paths[0].relative_to(data)) for paths in list(tables.values())[:4])
        raise ValueError(f"--data: {benchmark.name}: expected one table, got {names}; --data {benchmark.name}=FILE")
    (found,) = tables.values()
    if match := _NUMBERED.search(found[0].stem):
        count = int(match["count"])
        missing = set(range(count)) - {int(match["index"]) for path in found if (match := _NUMBERED.search(path.stem))}
        if missing:
            raise ValueError(f"--data: {found[0]}: shard {min(missing):05d} of {count} is missing beside it")
    return found


def _named(benchmark: Benchmark, parts: Sequence[str]) -> bool:
    plain = [re.sub(r"[^a-z0-9]", "", part.lower()) for part in parts]
    return any(name in part for name in benchmark.names for part in plain)


def _tables(paths: Sequence[Path]) -> dict[tuple[Path, str], list[Path]]:
    """Files, those of one numbered set together."""
    found: dict[tuple[Path, str], list[Path]] = {}
    for path in paths:
        match = _NUMBERED.search(path.name)
        name = path.name[: match.start()] + match["count"] if match else path.name
        found.setdefault((path.parent, name), []).append(path)
    return found


def rows(paths: Sequence[Path]) -> Iterator[tuple[Where, dict[str, Any]]]:
    """The rows of files, what is missing (empty, NaN, ``"nan"``) left out.

    Raises:
        RecordError: a file or a row cannot be read.
    """
    for path in paths:
        values = _tsv(path) if path.suffix == ".tsv" else read_values(path)
        for where, value in values:
            if isinstance(value, RecordError):
                raise value
            if not isinstance(value, dict):
                raise RecordError(where, "", "row", f"expected an object, got {short(value)}")
            yield where, {str(name): entry for name, entry in value.items() if not _missing(entry)}


def _tsv(path: Path) -> Iterator[tuple[Where, Any]]:
    csv.field_size_limit(max(csv.field_size_limit(), _FIELD_BYTES))
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, delimiter="\t")
            for number, row in enumerate(table, 1):
                where = Where(str(path), number)
                if None in row or None in row.values():
                    expected = f"expected {len(table.fieldnames or ())} fields, got another number"
                    raise RecordError(where, "", "row", expected)
                yield where, row
    except OSError as error:
        raise RecordError(Where(str(path)), "", "file", f"cannot be read ({error.strerror or error})") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise RecordError(Where(str(path)), "", "file", f"cannot be read as TSV ({error})") from None


def _missing(value: Any) -> bool:
    return value is None or value in ("", "nan") or (isinstance(value, float) and math.isnan(value))


def text_of(row: dict[str, Any], name: str, where: Where, *others: str) -> str:
    """A field as text, by the first of its names that the row has.

    Raises:
        RecordError: it has none.
    """
    for one in (name, *others):
        if one in row and not isinstance(row[one], dict | list | bytes):
            return str(row[one])
    raise RecordError(where, name, "field", f"expected a text, got {short(row.get(name))}")


def truth_of(row: dict[str, Any], where: Where) -> str:
    """The answer.

    Raises:
        RecordError: it is not published (the benchmarks' test splits).
    """
    if "answer" not in row:
        raise RecordError(where, "answer", "field", "expected the truth; this split has none, so nothing can be scored")
    return text_of(row, "answer", where)


def shown(value: Any, where: Where, name: str) -> str:
    """An image of a Parquet file, as a ``data:`` URI: bytes, or ``{"bytes": …}`` as the library ``datasets`` has them.

    Raises:
        RecordError: it is neither.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise RecordError(where, name, "image", f"expected the bytes of an image, got {short(value)}")
    return to_uri(data)


def references(fields: dict[str, tuple[Where, Any]]) -> dict[str, str]:
    """The images of a TSV by index, as ``data:`` URIs. A field of at most 64 characters is the index of another row,
    whose image it is, and which must have one itself.

    Args:
        fields: index → (where it stands, its ``image``).

    Raises:
        RecordError: a field is neither.
    """
    found = {}
    for index, (where, value) in fields.items():
        if isinstance(value, str) and len(value) <= _REFERENCE:
            target = fields.get(value, (where, None))[1]
            if not isinstance(target, str) or len(target) <= _REFERENCE:
                problem = f"expected an image in base64 or the index of a row that has one, got {short(value)}"
                raise RecordError(where, "image", "image", problem)
            value = target
        found[index] = f"data:;base64,{value}" if isinstance(value, str) else shown(value, where, "image")
    return found


def once(id: str, seen: set[str], where: Where, name: str) -> str:
    """An id that is not in ``seen``, and then is.

    Raises:
        RecordError: it is there.
    """
    if id in seen:
        raise RecordError(where, name, "duplicate id", f"{short(id)} was there before")
    seen.add(id)
    return id


def number(value: Any, kind: Callable[[Any], Any], where: Where, name: str) -> Any:
    """``kind(value)``.

    Raises:
        RecordError: it is none.
    """
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise RecordError(where, name, "field", f"expected a number, got {short(value)}") from None

"""Records in Parquet: read by groups of rows, written in one schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

from m4ov.data.records import Record, RecordError, Where

_ROWS = 1024  # that are in memory at a time


def rows(path: Path, start: int = 0) -> Iterator[tuple[Where, Any]]:
    """The rows of a file from row ``start``, with their places; at the end a :class:`RecordError`, if it is broken."""
    arrow, tables = libraries()
    row = 0
    try:
        with tables.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                if row + batch.num_rows <= start:
                    row += batch.num_rows
                    continue
                for value in batch.to_pylist():
                    row += 1
                    if row > start:
                        yield Where(str(path), row), _from_row(value)
    except (arrow.ArrowException, OSError) as error:
        where = Where(str(path))
        yield where, RecordError(where, "", "file", f"cannot be read as Parquet ({error})")


def group(path: Path, number: int) -> list[Any]:
    """The rows of one group.

    Raises:
        RecordError: the file is broken there.
    """
    arrow, tables = libraries()
    try:
        with tables.ParquetFile(path) as file:
            return [_from_row(row) for row in file.read_row_group(number).to_pylist()]
    except (arrow.ArrowException, OSError) as error:
        raise RecordError(Where(str(path)), "", "file", f"cannot be read as Parquet ({error})") from error


def _from_row(row: dict[str, Any]) -> Any:
    """A row as :func:`write` made it; other tables' rows stay as they are, without their nulls."""
    value = {name: entry for name, entry in row.items() if entry is not None}
    for name in ("reward", "meta"):
        if isinstance(value.get(name), str):
            with suppress(ValueError):  # the check names the field
                value[name] = json.loads(value[name])
    labels = value.get("labels")
    if isinstance(labels, list) and all(isinstance(pair, tuple) for pair in labels):
        value["labels"] = dict(labels)
    if isinstance(value.get("messages"), list):
        value["messages"] = [_without_nulls(message) for message in value["messages"]]
    return value


def _without_nulls(message: Any) -> Any:
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    blocks = [
        {name: entry for name, entry in block.items() if entry is not None} if isinstance(block, dict) else block
        for block in message["content"]
    ]
    return {**message, "content": blocks}


def write(records: Iterator[Record], file: IO[bytes]) -> int:
    """Write records; how many there were. What is free in form (``reward``, ``meta``) is JSON in a column."""
    arrow, tables = libraries()
    string = arrow.string()
    block = arrow.struct([("type", string), ("text", string), ("image", string)])
    turn = arrow.struct([("role", string), ("content", arrow.list_(block))])
    schema = arrow.schema(
        [
            ("id", string),
            ("messages", arrow.list_(turn)),
            ("labels", arrow.map_(string, arrow.list_(string))),
            ("difficulty", string),
            ("kind", string),
            ("rejected", arrow.list_(string)),
            ("reward", string),  # JSON, as it has no fixed fields
            ("meta", string),
        ]
    )
    count = 0
    with tables.ParquetWriter(file, schema) as writer:
        while rows := [_to_row(record) for record in islice(records, _ROWS)]:
            writer.write_table(arrow.Table.from_pylist(rows, schema=schema))
            count += len(rows)
    return count


def _to_row(record: Record) -> dict[str, Any]:
    row = record.to_json()
    for name in ("reward", "meta"):
        if name in row:
            row[name] = json.dumps(row[name], ensure_ascii=False, allow_nan=False)
    if "labels" in row:
        row["labels"] = list(row["labels"].items())
    return row


def libraries() -> tuple[Any, Any]:
    """pyarrow and its Parquet module.

    Raises:
        ImportError: it is not installed; says how to.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install 'm4ov[data]'") from error
    return pyarrow, pyarrow.parquet

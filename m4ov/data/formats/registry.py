"""The formats that are known, which of them a file is in, and its records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from m4ov.data.formats import canonical, llama_factory, openai, swift, trl, turns, verl, webdataset
from m4ov.data.formats.containers import files_of, rows_of
from m4ov.data.pictures import relative_images, store_images
from m4ov.data.records import Record, RecordError, Where, short
from m4ov.data.shards import MAX_LINE_BYTES, distinct, write_shards

_LOOKED_AT = 16  # rows


@dataclass(frozen=True)
class Format:
    """A format of rows.

    Attributes:
        fits: why a row is not of this format; ``None``: it is.
        convert: the record of a row.
    """

    name: str
    fits: Callable[[turns.Row], str | None]
    convert: Callable[[turns.Row, Where], Record]


#: By name; of those that fit, the first is taken.
FORMATS = {
    form.NAME: Format(form.NAME, form.fits, form.convert)
    for form in (webdataset, canonical, verl, llama_factory, swift, trl, openai)
}


class FormatError(ValueError):
    """No format fits a file; the message says what was found, and why each does not."""


def detect(path: str | Path, *, limit: int = MAX_LINE_BYTES) -> Format:
    """The format of a file, by the first rows in it that can be read.

    Raises:
        FormatError: none fits all of them, or there is no row; names the file, the fields that it has, and for each
            format why it is another.
    """
    rows, problem = [], ""
    for _, value in islice(rows_of(Path(path), limit), _LOOKED_AT):
        if isinstance(value, dict):
            rows.append(value)
        elif not problem:
            problem = f"; {value}" if isinstance(value, RecordError) else f"; a row is {short(value)}"
    if not rows:
        raise FormatError(f"{path}: no row that can be read{problem}")
    reasons = []
    for form in FORMATS.values():
        found = [reason for row in rows if (reason := form.fits(row)) is not None]
        if len(found) <= len(rows) // 4:  # a broken row does not make another format
            return form
        reasons.append(f"{form.name}: {found[0]}")
    fields = ", ".join(sorted(str(name) for name in rows[0])[:12])
    raise FormatError(f"{path}: no format fits rows of {fields or 'no fields'} ({'; '.join(reasons)})")


def named(format: str) -> Format:
    """A format by its name.

    Raises:
        FormatError: there is none.
    """
    if format not in FORMATS:
        raise FormatError(f"format: expected one of {', '.join(FORMATS)}; got {format!r}")
    return FORMATS[format]


def convert_row(form: Format, row: object, where: Where) -> Record:
    """The record of a row.

    Raises:
        RecordError: naming file, line and field.
    """
    return turns.made(form.convert, row, where)


def read(
    source: str | Path,
    format: str | None = None,
    *,
    on_error: Callable[[RecordError], None] | None = None,
    limit: int = MAX_LINE_BYTES,
) -> Iterator[tuple[Where, Record]]:
    """The records of a file, or of a folder's files, in any format, as a stream, each with where it is from: images'
    paths are relative to that file's folder.

    Args:
        format: a name; ``None``: detected, file by file.
        on_error: called for every row that is no record, and for a duplicate id; ``None``: the first one raises.

    Raises:
        FormatError: no format fits.
        RecordError: there is no such file, or without ``on_error``.
    """
    seen: set[str] = set()
    for path in files_of(source):
        form = detect(path, limit=limit) if format is None else named(format)
        yield from distinct(rows_of(path, limit), partial(convert_row, form), seen, on_error)


def convert(
    source: str | Path,
    folder: str | Path,
    format: str | None = None,
    *,
    on_error: Callable[[RecordError], None] | None = None,
    limit: int = MAX_LINE_BYTES,
    suffix: str = ".jsonl",
    shard_records: int = 10_000,
    replace: bool = False,
    keep: Callable[[Record], bool] | None = None,
) -> list[Path]:
    """Any format's data as shards of records in ``folder``. Embedded images go into ``folder/images``; others stay
    where they are, and are referred to by their paths relative to ``folder``.

    Args:
        keep: which records are written; ``None``: all.

    Raises:
        FormatError, RecordError: see :func:`read`.
        WriteError: see :func:`m4ov.data.shards.write_shards`.
    """
    folder = Path(folder)

    def moved(where: Where, record: Record) -> Record | None:
        try:
            return store_images(relative_images(record, Path(where.file).parent, folder), folder, where)
        except RecordError as error:
            if on_error is None:
                raise
            on_error(error)
            return None

    rows = read(source, format, on_error=on_error, limit=limit)
    found = (moved(where, record) for where, record in rows if keep is None or keep(record))
    records = (record for record in found if record is not None)
    return write_shards(records, folder, shard_records=shard_records, suffix=suffix, replace=replace)

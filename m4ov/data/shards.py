"""Files of records: JSONL and Parquet, read as a stream and written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from m4ov.data import parquet
from m4ov.data.records import Record, RecordError, Where, check, short

#: A longer line is named and skipped, without being read into memory.
MAX_LINE_BYTES = 16 * 2**20
_STEP_BYTES = 2**20
_SUFFIXES = (".jsonl", ".parquet")
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})$")


class WriteError(OSError):
    """A file of records cannot be written; the message names it and says why. Nothing half-written stays."""


class _SourceError(Exception):
    """The records' own iterator failed with an OSError: no fault of the file that is written."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(cause)
        self.cause = cause


class Line(NamedTuple):
    """A line of a file. ``number`` from 1; ``offset`` and ``size`` in bytes; ``data`` is ``None`` if it is too long."""

    number: int
    offset: int
    size: int
    data: bytes | None


def lines(file: IO[bytes], limit: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """The lines of a file, without their ends; a line over ``limit`` bytes is passed over a MiB at a time."""
    number = offset = 0
    while data := file.readline(limit + 1):
        number, size = number + 1, len(data)
        whole: bytes | None = data
        if size > limit and not data.endswith(b"\n"):
            whole = None
            while data and not data.endswith(b"\n"):
                data = file.readline(_STEP_BYTES)
                size += len(data)
        yield Line(number, offset, size, None if whole is None else whole.rstrip(b"\r\n"))
        offset += size


def parse_line(line: Line, where: Where, limit: int = MAX_LINE_BYTES) -> Any:
    """The JSON of a line.

    Raises:
        RecordError: it is too long, not UTF-8 or not JSON.
    """
    if line.data is None:
        size = f"{line.size / 2**20:.1f} MiB; at most {limit / 2**20:.1f} MiB are read"
        raise RecordError(where, "", "line too long", size)
    data = line.data.removeprefix(b"\xef\xbb\xbf") if line.number == 1 else line.data
    try:
        return json.loads(data.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise RecordError(where, "", "encoding", f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise RecordError(where, "", "not JSON", f"not JSON ({error})") from None


def shards_of(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files of records that a path stands for: itself, or those of a folder (``*.jsonl``, ``*.parquet``), by name.

    Raises:
        RecordError: there is none, or some of a numbered set (``…-00000-of-00004.jsonl``) are missing.
    """
    if not isinstance(source, str | Path):
        return [path for one in source for path in shards_of(one)]
    source = Path(source)
    if not source.exists():
        raise RecordError(Where(str(source)), "", "file", "no such file or folder")
    if source.is_file():
        return [source]
    found = sorted(path for path in source.iterdir() if path.suffix in _SUFFIXES and not path.name.startswith("."))
    if not found:
        raise RecordError(Where(str(source)), "", "file", f"no file *{' or *'.join(_SUFFIXES)} in this folder")
    sets: dict[tuple[str, int, str], set[int]] = {}
    for path in found:
        if match := _NUMBERED.match(path.stem):
            sets.setdefault((match["stem"], int(match["count"]), path.suffix), set()).add(int(match["index"]))
    for (stem, count, suffix), there in sets.items():
        if missing := sorted(set(range(count)) - there):
            problem = f"missing {stem}-{missing[0]:05d}-of-{count:05d}{suffix}"
            raise RecordError(Where(str(source)), "", "file", f"{problem} ({len(there)} of {count} are there)")
    return found


def read_values(
    path: Path, *, limit: int = MAX_LINE_BYTES, start: int = 0
) -> Iterator[tuple[Where, dict[str, Any] | RecordError | Any]]:
    """The JSON values of a JSONL file's lines, or the rows of a Parquet file, as they come; empty lines are left out.

    Args:
        start: lines or rows to pass over.

    Yields:
        Where it is from, and the value; or the :class:`RecordError` that says why there is none. One about the file as
        a whole (missing, truncated) is the last.
    """
    try:
        if path.suffix == ".parquet":
            yield from parquet.rows(path, start)
            return
        with path.open("rb") as file:
            for line in lines(file, limit):
                if line.number <= start or (line.data is not None and not line.data.strip()):
                    continue
                where = Where(str(path), line.number)
                try:
                    value = parse_line(line, where, limit)
                except RecordError as error:
                    value = error
                yield where, value
    except OSError as error:
        where = Where(str(path))
        yield where, RecordError(where, "", "file", f"cannot be read ({error.strerror or error})")


def read_records(
    source: str | Path | Sequence[str | Path],
    *,
    on_error: Callable[[RecordError], None] | None = None,
    limit: int = MAX_LINE_BYTES,
    absolute: bool = False,
) -> Iterator[Record]:
    """The records of files or folders, as a stream.

    Args:
        source: a JSONL or Parquet file, a folder of such, or several.
        on_error: called for every line that is no record, also one whose ``id`` was there before; then the next line is
            read. ``None``: the first one raises.
        limit: bytes of a line; a longer one is an error, and is not read into memory.
        absolute: images' paths are made absolute; they are relative to the folder of their file.

    Raises:
        RecordError: naming file, line and field, without ``on_error``; or there is no such file.
    """
    seen: set[str] = set()
    for path in shards_of(source):
        for _, record in distinct(read_values(path, limit=limit), Record.from_json, seen, on_error):
            yield with_images(record, path.parent) if absolute else record


def distinct(
    rows: Iterable[tuple[Where, Any]],
    convert: Callable[[Any, Where], Record],
    seen: set[str],
    on_error: Callable[[RecordError], None] | None,
) -> Iterator[tuple[Where, Record]]:
    """The records of rows; what is none, or has an id in ``seen``, goes to ``on_error``, or is raised without it."""
    for where, value in rows:
        try:
            if isinstance(value, RecordError):
                raise value
            record = convert(value, where)
            if record.id in seen:
                raise RecordError(where, "id", "duplicate id", f"{short(record.id)} was there before", record.id)
        except RecordError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        seen.add(record.id)
        yield where, record


def image_path(reference: str, folder: Path) -> Path:
    """The file of an image, of a record whose file is in ``folder``."""
    return folder.absolute() / reference.removeprefix("file://")


def with_images(record: Record, folder: Path) -> Record:
    """The record with absolute paths of images; ``data:`` URIs stay."""
    return map_images(record, lambda ref: ref if ref.startswith("data:") else str(image_path(ref, folder)))


def map_images(record: Record, change: Callable[[str], str]) -> Record:
    """The record with other references of images."""

    def changed(block: dict[str, Any]) -> dict[str, Any]:
        return {**block, "image": change(block["image"])} if block["type"] == "image" else block

    turns = [{**turn, "content": [changed(block) for block in turn["content"]]} for turn in record.messages]
    return dataclasses.replace(record, messages=turns)


def write_records(records: Iterable[Record], path: str | Path) -> int:
    """Write one file, JSONL or Parquet by its suffix, under a temporary name; it stands whole or not at all.

    Returns:
        How many there were.

    Raises:
        RecordError: a record is not one, or an id comes twice; ``line`` counts the records.
        WriteError: the file cannot be written: no space, no permission.
    """
    path = Path(path)
    with replacing(path) as temporary:
        return _write(_checked(records, path), temporary, path.suffix)


def write_shards(
    records: Iterable[Record],
    folder: str | Path,
    *,
    shard_records: int = 10_000,
    stem: str = "records",
    suffix: str = ".jsonl",
    replace: bool = False,
) -> list[Path]:
    """Write ``<stem>-00000-of-<count><suffix>``, …: files of ``shard_records`` records each, the last of fewer.

    They get their names when all of them are written. No record: one empty file.

    Args:
        suffix: ``".jsonl"`` or ``".parquet"``.
        replace: shards of this stem that are there are replaced; else they are an error.

    Raises:
        RecordError: a record is not one, or an id comes twice.
        WriteError: they cannot be written, or some are there.
    """
    folder = Path(folder)
    if shard_records < 1:
        raise ValueError(f"write_shards: shard_records: expected 1 or more; got {shard_records}")
    former = [path for path in _listed(folder) if (match := _NUMBERED.match(path.stem)) and match["stem"] == stem]
    if former and not replace:
        raise WriteError(f"{folder}: {former[0].name} is there; choose another folder, or replace=True")
    written: list[Path] = []
    stream = _checked(records, folder / f"{stem}{suffix}")
    try:
        while True:
            temporary = folder / f".{stem}-{len(written):05d}.{os.getpid()}.writing"
            written.append(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            count = _write(islice(stream, shard_records), temporary, suffix)
            if count < shard_records:
                break
        if count == 0 and len(written) > 1:
            written.pop().unlink()
        named = [folder / f"{stem}-{n:05d}-of-{len(written):05d}{suffix}" for n in range(len(written))]
        for temporary, path in zip(written, named, strict=True):
            temporary.replace(path)
        for path in former:
            if path not in named:
                path.unlink()
        _sync_folder(folder)
        return named
    except _SourceError as error:
        raise error.cause from None
    except OSError as error:
        raise _unwritable(folder / f"{stem}-*{suffix}", error) from error
    finally:
        for temporary in written:
            temporary.unlink(missing_ok=True)


def _write(records: Iterator[Record], temporary: Path, suffix: str) -> int:
    if suffix not in _SUFFIXES:
        raise ValueError(f"a file of records ends in {' or '.join(_SUFFIXES)}; got {suffix!r}")
    count = 0
    with temporary.open("wb") as file:
        if suffix == ".parquet":
            count = parquet.write(records, file)
        else:
            for record in records:
                file.write(record.to_line().encode() + b"\n")
                count += 1
        file.flush()
        os.fsync(file.fileno())
    return count


def _checked(records: Iterable[Record], path: Path) -> Iterator[Record]:
    seen: set[str] = set()
    number = 0
    try:
        for record in records:
            number += 1
            where = Where(str(path), number)
            check(record, where)
            if record.id in seen:
                raise RecordError(where, "id", "duplicate id", f"{short(record.id)} was there before", record.id)
            seen.add(record.id)
            yield record
    except OSError as error:
        raise _SourceError(error) from error


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name, which becomes ``path`` at the end, or is removed.

    Raises:
        WriteError: naming ``path``.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
        _sync_folder(path.parent)
    except _SourceError as error:
        raise error.cause from None
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):  # it is gone, or never was
            temporary.unlink()


def _unwritable(path: Path, error: OSError) -> WriteError:
    reason = error.strerror or error
    return error if isinstance(error, WriteError) else WriteError(f"{path}: cannot be written ({reason})")


def _sync_folder(folder: Path) -> None:
    """So that the new name survives a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")

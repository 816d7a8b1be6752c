"""Rows of files of any container: lines of JSON, an array of JSON, Parquet, tars; read as streams."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m4ov.data import parquet
from m4ov.data.formats.webdataset import KEY
from m4ov.data.records import RecordError, Where, short
from m4ov.data.shards import MAX_LINE_BYTES, read_values

#: How names of files end that are looked for in a folder.
SUFFIXES = (".jsonl", ".json", ".parquet", ".tar", ".tar.gz", ".tgz")
_SETTINGS = ("dataset_info.json",)  # LLaMA-Factory's list of data sets
_CHUNK = 2**20
_SPACE = " \t\r\n"
_SAMPLE = 4  # a sample of a tar may be so many times as large as a line

Rows = Iterator[tuple[Where, Any]]


def files_of(source: str | Path) -> list[Path]:
    """A file, or the files with data of a folder, by name.

    Raises:
        RecordError: there are none.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise RecordError(Where(str(source)), "", "file", "no such file or folder")
    found = sorted(path for path in source.iterdir() if path.name.endswith(SUFFIXES) and not path.name.startswith("."))
    found = [path for path in found if path.is_file() and path.name not in _SETTINGS]
    if not found:
        raise RecordError(Where(str(source)), "", "file", f"no file *{' *'.join(SUFFIXES)} in this folder")
    return found


def rows_of(path: Path, limit: int = MAX_LINE_BYTES) -> Rows:
    """The rows of a file: where from, and the value or the :class:`RecordError` that says why there is none. One about
    the file as a whole is the last."""
    where = Where(str(path))
    try:
        with path.open("rb") as file:
            start = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n")
    except OSError as error:
        yield where, RecordError(where, "", "file", f"cannot be read ({error.strerror or error})")
        return
    if not start:
        yield where, RecordError(where, "", "file", "the file is empty")
    elif path.suffix == ".parquet" or start.startswith(b"PAR1"):
        yield from parquet.rows(path)
    elif path.name.endswith((".tar", ".tar.gz", ".tgz")):
        yield from _tar(path, limit * _SAMPLE)
    elif start.startswith(b"["):
        yield from _array(path, limit)
    else:
        yield from read_values(path, limit=limit)


def _array(path: Path, limit: int) -> Rows:
    """The elements of an array, one at a time; of one of more than ``limit`` characters not much more is read."""
    decoder = json.JSONDecoder()
    buffer, line = "", 1
    at, end = 0, False  # the next element begins at buffer[at]
    expected, count = "[", 0
    where = Where(str(path), line)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while True:
                while at < len(buffer) and buffer[at] in _SPACE:
                    line += buffer[at] == "\n"
                    at += 1
                if at == len(buffer) and not end:
                    buffer, at = file.read(_CHUNK), 0
                    end = not buffer
                    continue
                where = Where(str(path), line)
                if at == len(buffer):
                    raise ValueError(f"the file ends where {expected!r} was expected")
                if buffer[at] == "]" and expected != "[":
                    return
                if expected in ("[", ","):
                    if buffer[at] != expected:
                        raise ValueError(f"expected {expected!r}, got {short(buffer[at])}")
                    expected, at = "an element", at + 1
                    continue
                where = Where(str(path), line, count + 1)
                long = f"an element of more than {limit / 2**20:.1f} MiB"
                try:
                    value, after = decoder.raw_decode(buffer, at)
                except (ValueError, RecursionError) as error:
                    if len(buffer) - at > limit:
                        yield where, RecordError(where, "", "line too long", f"{long}; the rest is not read")
                        return
                    more = "" if end else file.read(max(_CHUNK, len(buffer) - at))
                    if not more:
                        raise ValueError(str(error)) from None
                    buffer, at = buffer[at:] + more, 0
                    continue
                if after - at > limit:
                    value = RecordError(where, "", "line too long", long)
                line, count = line + buffer.count("\n", at, after), count + 1
                expected, at = ",", after
                yield where, value
    except UnicodeDecodeError as error:
        yield where, RecordError(where, "", "encoding", f"not UTF-8 ({error.reason}); the rest is not read")
    except ValueError as error:
        yield where, RecordError(where, "", "not JSON", f"not JSON ({error}); the rest is not read")
    except OSError as error:
        yield where, RecordError(where, "", "file", f"cannot be read ({error.strerror or error})")


def _tar(path: Path, limit: int) -> Rows:
    """Members in groups of one name, up to the first dot, as webdataset has them; ``line`` counts the groups."""
    key, row, number, held = "", dict[str, Any](), 0, 0
    problem: RecordError | None = None
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined] # or it remembers every one
                folder, slash, name = member.name.rpartition("/")
                if not member.isfile() or name.startswith("."):
                    continue
                stem, _, kind = name.partition(".")
                stem = folder + slash + stem
                if stem != key:
                    if row or problem:
                        yield Where(str(path), number), problem or {KEY: key, **row}
                    key, row, number, problem, held = stem, {}, number + 1, None, 0
                held += member.size
                if held > limit:
                    size = f"{held / 2**20:.1f} MiB; at most {limit / 2**20:.1f} MiB are read of a sample"
                    problem = problem or RecordError(Where(str(path), number), member.name, "line too long", size)
                    continue
                content = tar.extractfile(member)
                assert content is not None  # a file
                data = content.read()
                if len(data) < member.size:
                    raise tarfile.ReadError(f"it ends within {member.name}")
                row[kind.lower()] = data
            if tar.fileobj is None or tar.fileobj.tell() < tar.offset + tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it ends without the block that ends a tar")
        if row or problem:
            yield Where(str(path), number), problem or {KEY: key, **row}
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError) as error:
        where = Where(str(path))
        yield where, RecordError(where, "", "file", f"cannot be read as a tar ({error}); after {number} samples")

"""Records of many shards by their number, without reading them all; and an order that reads neighbours together."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m4ov.data import parquet
from m4ov.data.records import Record, RecordError, Where
from m4ov.data.shards import MAX_LINE_BYTES, Line, parse_line, shards_of

_BLOCK = 1024  # lines of JSONL that are shuffled together; in Parquet a group of rows
_BLOCKS = 8  # blocks that a sample is drawn from, and groups of rows in memory
_CHUNK = 4 * 2**20
_FILES = 64  # open at a time
_SAMPLES, _SAMPLE = 256, 4096  # parts of a file that is not read whole, and their bytes


class Block(NamedTuple):
    """Records that stand together: of a file's group of rows, or lines. ``first``: the file's row or line, from 0."""

    path: Path
    group: int
    first: int
    size: int


class RecordIndex:
    """The records of files or folders, numbered from 0 in the order of files and lines.

    JSONL is scanned once for the ends of lines (8 bytes of memory a record); Parquet is asked for its groups of rows.

    Attributes:
        bytes: of all files.
        fingerprint: of what is in them, in hex: of every byte of JSONL, which is read anyway; of Parquet as
            :func:`sampled` says. Names and times are not in it.

    Raises:
        RecordError: a file cannot be read, or none is there.
    """

    def __init__(self, source: str | Path | Sequence[str | Path], *, limit: int = MAX_LINE_BYTES) -> None:
        self.limit = limit
        self.blocks: list[Block] = []
        self.bytes = 0
        self._bounds: dict[Path, np.ndarray] = {}  # of a JSONL file: int64 [lines + 1], where lines begin
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._groups: OrderedDict[tuple[Path, int], list[Any]] = OrderedDict()
        digest = hashlib.blake2b(digest_size=16)
        for path in shards_of(source):
            try:
                self.bytes += path.stat().st_size
                if path.suffix == ".parquet":
                    counts, found = self._groups_of(path), sampled(path)
                else:
                    counts, found = self._lines_of(path)
                digest.update(found)
            except OSError as error:
                raise RecordError(Where(str(path)), "", "file", f"cannot be read ({error.strerror or error})") from None
            first = 0
            for group, count in enumerate(counts):
                if count:
                    self.blocks.append(Block(path, group, first, count))
                first += count
        self._begins = [0, *accumulate(block.size for block in self.blocks)]
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return self._begins[-1]

    def where(self, index: int) -> Where:
        """File and line of a record."""
        block, place = self._find(index)
        return Where(str(block.path), block.first + place + 1)

    def __getitem__(self, index: int) -> Record | None:
        """The record; ``None``: an empty line.

        Raises:
            RecordError: the line is no record.
        """
        block, place = self._find(index)
        where = Where(str(block.path), block.first + place + 1)
        try:
            if block.path.suffix == ".parquet":
                return Record.from_json(self._rows(block)[place], where)
            begin, end = (int(value) for value in self._bounds[block.path][block.first + place :][:2])
            size = end - begin
            data = os.pread(self._handle(block.path), size, begin) if size <= self.limit + 1 else None
        except OSError as error:
            raise RecordError(where, "", "file", f"cannot be read ({error.strerror or error})") from error
        if data is not None and len(data) < size:
            raise RecordError(where, "", "file", "the file has become shorter")
        if data is not None and not data.strip():
            return None
        if data is not None and size > self.limit and not data.endswith(b"\n"):
            data = None
        value = parse_line(Line(where.line, begin, size, data), where, self.limit)
        return Record.from_json(value, where)

    def order(self, random: np.random.Generator) -> np.ndarray:
        """A random order of all records, int64 ``[N]``: blocks in random order, and the records of ``_BLOCKS`` blocks
        after each other shuffled together. So files are read nearly in sequence, and few groups of rows are held."""
        blocks = random.permutation(len(self.blocks))
        parts = []
        for begin in range(0, len(blocks), _BLOCKS):
            near = [np.arange(self._begins[n], self._begins[n + 1]) for n in blocks[begin : begin + _BLOCKS]]
            parts.append(random.permutation(np.concatenate(near)))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def close(self) -> None:
        """Close the files."""
        while self._open:
            os.close(self._open.popitem()[1])
        self._groups.clear()

    def _find(self, index: int) -> tuple[Block, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} records; got {index}")
        number = bisect_right(self._begins, index) - 1
        return self.blocks[number], index - self._begins[number]

    def _lines_of(self, path: Path) -> tuple[list[int], bytes]:
        """Lines of each block, and the digest of the file."""
        ends, offset = [np.zeros(1, dtype=np.int64)], 0
        digest = hashlib.blake2b(digest_size=16)
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                ends.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + (offset + 1))
                offset += len(chunk)
        bounds = np.concatenate(ends)
        if bounds[-1] != offset:  # the last line has no end
            bounds = np.append(bounds, offset)
        self._bounds[path] = bounds
        lines = len(bounds) - 1
        return [min(_BLOCK, lines - first) for first in range(0, lines, _BLOCK)], digest.digest()

    def _groups_of(self, path: Path) -> list[int]:
        arrow, tables = parquet.libraries()
        try:
            with tables.ParquetFile(path) as file:
                groups = file.metadata
                return [groups.row_group(n).num_rows for n in range(groups.num_row_groups)]
        except arrow.ArrowException as error:
            raise RecordError(Where(str(path)), "", "file", f"cannot be read as Parquet ({error})") from error

    def _rows(self, block: Block) -> list[Any]:
        key = block.path, block.group
        if key not in self._groups:
            self._groups[key] = parquet.group(block.path, block.group)
            if len(self._groups) > _BLOCKS + 2:  # two for samples that have waited since the blocks before
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _handle(self, path: Path) -> int:
        if path not in self._open:
            self._open[path] = os.open(path, os.O_RDONLY)
            if len(self._open) > _FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(path)
        return self._open[path]


def sampled(path: Path) -> bytes:
    """A digest of a file's size and of 256 parts of 4 KiB, evenly spread, its beginning and its end among them: of a
    file of up to a MiB, all of it.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        last = max(0, size - _SAMPLE)
        begins = range(0, size, _SAMPLE) if size <= _SAMPLES * _SAMPLE else np.linspace(0, last, _SAMPLES).astype(int)
        for begin in begins:
            digest.update(os.pread(file.fileno(), _SAMPLE, int(begin)))
    return digest.digest()

"""Where bad records are named."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

from m4ov.data.records import RecordError
from m4ov.data.shards import WriteError


class Quarantine:
    """A file of bad records, one a line; each is in it once, also when a run goes on."""

    def __init__(self, path: str | Path | None, rank: int) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None and rank:
            self.path = self.path.with_name(f"{self.path.stem}-rank{rank}{self.path.suffix}")
        self._named: set[tuple[str, int]] | None = None

    def add(self, error: RecordError) -> None:
        """Append a line; whole, or not at all.

        Raises:
            WriteError: it cannot be written.
        """
        if self.path is None:
            return
        try:
            if self._named is None:
                self._named = self._read()
            key = error.where.file, error.where.line
            if key in self._named:
                return
            line = json.dumps(error.to_json(), ensure_ascii=False).encode(errors="replace") + b"\n"
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                size = os.fstat(handle).st_size
                written = 0
                try:
                    written = os.write(handle, line)
                finally:
                    if written < len(line):
                        os.ftruncate(handle, size)
                if written < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(handle)
            self._named.add(key)
        except WriteError:
            raise
        except OSError as failure:
            raise WriteError(f"{self.path}: cannot be written ({failure.strerror or failure})") from failure

    def _read(self) -> set[tuple[str, int]]:
        """What is in it; a line that a crash has cut is removed."""
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return set()
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        try:
            rows = [json.loads(line) for line in data[:whole].splitlines()]
            named = {(row["file"], row["line"]) for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise WriteError(f"{self.path}: is there, and is no list of bad records ({error!r})") from error
        if whole < len(data):
            os.truncate(self.path, whole)
        return named

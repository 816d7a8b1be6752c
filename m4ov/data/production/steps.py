"""Steps over shards: files written whole, and a manifest for each shard, by which it is known to be done.

A step is a function of one :class:`Task`: it reads files, and gives rows for files of its own. What it gives depends on
nothing but its inputs and settings, so that whoever runs it, and however often it was cut off, the bytes are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m4ov.data.records import RecordError
from m4ov.data.shards import read_values
from m4ov.data.whole import write_whole

#: Part of every fingerprint. Another number makes every shard anew.
VERSION = 1
WRITING = ".writing"  # the end of temporary names (m4ov.data.whole)
_LINE_LIMIT = 2**30  # of our own shards: what was written must be read

Row = Mapping[str, Any]


class BuildError(RuntimeError):
    """Data production cannot go on; the message says why. The same command goes on where it was."""


@dataclass(frozen=True)
class Task:
    """One shard of one step.

    Attributes:
        root: the run folder.
        step: name of the step, and of its folder.
        index: of the shard.
        function: what makes it; a function of a module, so that another process can run it.
        inputs: file (relative to ``root``) → SHA-256, of what it reads.
        settings: all else that its result depends on; JSON.
        context: what its result does not depend on (a teacher's address, a cache); JSON.
    """

    root: str
    step: str
    index: int
    function: Callable[[Task], Result]
    inputs: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        function = f"{self.function.__module__}.{self.function.__qualname__}"
        content = [VERSION, self.step, self.index, function, self.inputs, self.settings]
        return hashlib.sha256(dump(content).encode()).hexdigest()

    @property
    def name(self) -> str:
        return f"{self.step} {self.index}"

    def path(self, name: str) -> Path:
        """A file of the run folder."""
        return Path(self.root) / name

    def rows(self, *kinds: str) -> Iterator[dict[str, Any]]:
        """The rows of the inputs, in order; only of files of these kinds (``….KIND.jsonl``), if some are named."""
        for name in self.inputs:
            if not kinds or name.split(".")[-2] in kinds:
                yield from read_rows(self.path(name))

    def output(self, kind: str) -> str:
        """The name of an output, relative to the run folder."""
        return f"steps/{self.step}/{self.index:05d}.{kind}.jsonl"

    @property
    def manifest(self) -> Path:
        return self.path(f"steps/{self.step}/{self.index:05d}.manifest.json")


@dataclass
class Result:
    """What a step gives.

    Attributes:
        outputs: kind → rows; ``rejected`` rows say ``stage``, ``id``, ``reason`` and ``detail``.
        counts: whole numbers that add up over shards; they stand in the manifest.
        spent: what this run did and another may not (answers from the cache): added up, not written.
    """

    outputs: dict[str, Iterable[Row]]
    counts: dict[str, int] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """A finished shard. ``outputs``: file → SHA-256; ``spent``: empty if it was finished before."""

    index: int
    outputs: dict[str, str]
    counts: dict[str, int]
    spent: dict[str, float] = field(default_factory=dict)
    before: bool = False

    def of(self, *kinds: str) -> dict[str, str]:
        """The outputs of these kinds."""
        return {name: digest for name, digest in self.outputs.items() if name.split(".")[-2] in kinds}


def run(task: Task) -> Done:
    """Make a shard: outputs first, each under a temporary name, then the manifest.

    Raises:
        WriteError: a file cannot be written; what was half-written is gone.
        BuildError: an input is not what it was.
    """
    result = task.function(task)
    outputs = {}
    for kind, rows in result.outputs.items():
        outputs[task.output(kind)] = write_rows(task.path(task.output(kind)), rows)
    counts = dict(sorted(result.counts.items()))
    manifest = {"fingerprint": task.fingerprint, "inputs": task.inputs, "outputs": outputs, "counts": counts}
    write_whole(task.manifest, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return Done(task.index, outputs, counts, result.spent)


def done(task: Task) -> Done | None:
    """The shard, if it was made before by an equal task and its files are still as they were."""
    try:
        manifest = json.loads(task.manifest.read_text(encoding="utf-8"))
        outputs, counts = dict(manifest["outputs"]), dict(manifest["counts"])
        if manifest["fingerprint"] != task.fingerprint:
            return None
        if any(digest_of(task.path(name)) != digest for name, digest in outputs.items()):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Done(task.index, outputs, counts, before=True)


def tidy(folder: Path, shards: int) -> None:
    """Remove the shards of an earlier run that had more of them."""
    for path in folder.glob("[0-9]*.*"):
        number = path.name.partition(".")[0]
        if number.isdigit() and int(number) >= shards:
            path.unlink(missing_ok=True)


def sweep(root: Path) -> None:
    """Remove what killed processes half-wrote."""
    for path in root.glob(f"**/.*{WRITING}"):
        path.unlink(missing_ok=True)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of one of our own files.

    Raises:
        BuildError: it cannot be read, or a line of it is no object.
    """
    for where, value in read_values(path, limit=_LINE_LIMIT):
        if isinstance(value, RecordError):
            raise BuildError(str(value))
        if not isinstance(value, dict):
            raise BuildError(f"{where.file}, line {where.line}: expected an object, got a {type(value).__name__}")
        yield value


def dump(value: Any) -> str:
    """JSON on one line, the same for equal values whose keys were set in the same order."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def write_rows(path: Path, rows: Iterable[Row]) -> str:
    """Write JSONL at once; returns the SHA-256 of the bytes.

    Raises:
        WriteError: it cannot be written (no space, no permission); nothing half-written stays.
    """
    content = b"".join(dump(row).encode() + b"\n" for row in rows)
    write_whole(path, content)
    return hashlib.sha256(content).hexdigest()


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def add(total: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add counts to counts."""
    for name, count in more.items():
        total[name] = total.get(name, 0) + count


def rejected(stage: str, id: str, reason: str, detail: str, **more: Any) -> dict[str, Any]:
    """A row of ``rejected.jsonl``: who was turned away where, and why."""
    return {"stage": stage, "id": id, "reason": reason, "detail": detail, **more}

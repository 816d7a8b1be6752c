"""Anybody's data as what the streaming loader reads: records as they are; other formats, and sets that are to be
divided, converted once into a run's folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

from m4ov.data.formats import convert, detect
from m4ov.data.formats.containers import files_of
from m4ov.data.index import RecordIndex, sampled
from m4ov.data.quarantine import Quarantine
from m4ov.data.records import Record, RecordError
from m4ov.data.sources import DataError
from m4ov.data.whole import write_whole

_DIRECT = (".jsonl", ".parquet")  # that the loader reads
_FEW = 16  # bad rows that no share of all is asked of


def adopt(
    source: str,
    folder: Path,
    *,
    format: str = "",
    share: float = 0.0,
    max_bad: float = 0.1,
    quarantine: Path | None = None,
    fixed: bool = False,
) -> tuple[Path, Path | None]:
    """Records to train on, and those that are held out of them.

    What has to be converted stands in ``folder/train`` and ``folder/held-out``, whole or not at all, with
    ``folder/adopted.json``, which says what it was made from; a later call takes it as it is.

    Args:
        source: a file or a folder, in any format of :mod:`m4ov.data.formats`.
        folder: of the run's own copies.
        format: its name; empty: detected, file by file.
        share: of the records that are held out. Records that show the same first image go together.
        max_bad: share of the rows that may be no records, where there are more than 16 of them.
        quarantine: a file that names those.
        fixed: a training rests on what was converted: data that has changed since is an error. Else it is converted
            again.

    Returns:
        ``source`` and ``None``, if its files are records already and nothing is held out; else the two folders.

    Raises:
        FormatError, RecordError, WriteError: see :func:`m4ov.data.formats.convert`.
        DataError: too many rows are no records; no record is left on one side; ``fixed`` data has changed.
    """
    files = files_of(source)
    if not share and _direct(files, format):
        return Path(source), None
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        digest.update(sampled(path))
    made_from = {"source": str(source), "contents": digest.hexdigest(), "format": format, "share": share}
    mark, parts = folder / "adopted.json", [folder / "train", folder / "held-out"]
    if mark.exists():
        found = json.loads(mark.read_text(encoding="utf-8"))
        if found == made_from:
            return parts[0], parts[1] if share else None
        if fixed:
            what = ", ".join(name for name, value in made_from.items() if found.get(name) != value)
            raise DataError(
                f"{source}: its {what} changed since it was converted into {folder}, which the run rests on; "
                "choose another run folder"
            )
        shutil.rmtree(folder)
    named = Quarantine(quarantine, 0)
    bad: set[tuple[str, int, int]] = set()
    last = ""

    def on_error(error: RecordError) -> None:
        nonlocal last
        last = str(error)
        bad.add(error.where)
        named.add(error)

    def held_out(record: Record) -> bool:
        return zlib.crc32(next(iter(record.images), record.id).encode()) < share * 2**32

    kept: list[tuple[Path, Callable[[Record], bool]]] = [(parts[0], lambda record: not held_out(record))]
    kept += [(parts[1], held_out)] if share else []
    good = 0
    for part, keep in kept:
        convert(source, part, format or None, on_error=on_error, keep=keep, replace=True)
        count = len(RecordIndex(part))
        good += count
        if not count:
            problem = f"none of its {len(bad)} rows is a record ({last})" if bad else "it has none"
            if share:
                problem = f"none is left for {'training' if part is parts[0] else 'measuring'} (a share of {share:g})"
            raise DataError(f"{source}: expected records; {problem}")
    if len(bad) > max(_FEW, max_bad * (good + len(bad))):
        shutil.rmtree(folder)
        raise DataError(f"{source}: {len(bad)} of {good + len(bad)} rows are no records; the last: {last}")
    write_whole(mark, json.dumps(made_from, indent=1) + "\n")
    return parts[0], parts[1] if share else None


def _direct(files: list[Path], format: str) -> bool:
    """Whether the loader reads these files as they are."""
    if any(path.suffix not in _DIRECT for path in files):
        return False
    return all((format or detect(path).name) == "records" for path in files)

"""What is wrong with data, all of it: ``validate`` reads files in any format, and names file, line and field."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m4ov.data.formats.containers import files_of, rows_of
from m4ov.data.formats.registry import Format, FormatError, convert_row, detect, named
from m4ov.data.formats.turns import IDS
from m4ov.data.formats.webdataset import KEY
from m4ov.data.images import ImageError
from m4ov.data.pictures import image_header, load_image
from m4ov.data.records import Record, RecordError, Where, short
from m4ov.data.shards import MAX_LINE_BYTES, replacing

_WAITING = 256  # records whose images are being looked at


@dataclass(frozen=True)
class FileReport:
    """Of one file: its format (``"?"``: none fits), its rows, those that are right, its images."""

    path: Path
    format: str
    rows: int
    right: int
    images: int


@dataclass
class Report:
    """What :func:`validate` found.

    Attributes:
        files: in the order in which they were read.
        counts: of problems, by kind.
        problems: the first of them, at most ``keep``; all are in the file that ``problems_to`` named.
    """

    files: list[FileReport] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[RecordError] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.counts

    @property
    def total(self) -> int:
        """Problems."""
        return sum(self.counts.values())

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {
            "ok": self.ok,
            "files": [
                {"path": str(f.path), "format": f.format, "rows": f.rows, "right": f.right, "images": f.images}
                for f in self.files
            ],
            "counts": dict(self.counts.most_common()),
            "problems": [problem.to_json() for problem in self.problems],
        }

    def render(self, console: Any, *, most: int = 20) -> None:
        """Tables of the files, of the kinds of problems, and of the first ``most`` problems, on a rich console."""
        from rich.markup import escape
        from rich.table import Table

        files = Table("file", "format", title="Files", title_justify="left")
        for name in ("rows", "right", "images"):
            files.add_column(name, justify="right")
        for found in self.files:
            numbers = (f"{number:,}" for number in (found.rows, found.right, found.images))
            files.add_row(escape(str(found.path)), found.format, *numbers)
        console.print(files)
        if self.ok:
            console.print("[green]nothing is wrong[/green]")
            return
        kinds = Table("kind", title="Problems", title_justify="left")
        kinds.add_column("count", justify="right")
        for kind, count in self.counts.most_common():
            kinds.add_row(escape(kind), f"{count:,}")
        console.print(kinds)
        rows = Table("where", "field", "problem", title_justify="left")
        rows.title = f"The first {min(most, len(self.problems))} of {self.total:,}"
        for problem in self.problems[:most]:
            line = f", line {problem.where.line}" if problem.where.line else ""
            rows.add_row(
                *(escape(cell) for cell in (f"{problem.where.file}{line}", problem.field, problem.problem[:300]))
            )
        console.print(rows)


def validate(
    paths: str | Path | Sequence[str | Path],
    format: str | None = None,
    *,
    images: str = "header",
    threads: int = 4,
    limit: int = MAX_LINE_BYTES,
    keep: int = 1000,
    problems_to: str | Path | None = None,
    also: Callable[[Record, Where], None] | None = None,
) -> Report:
    """Check data in any format; bad rows are reported and never raise.

    Args:
        paths: files, or folders of files.
        format: a name of :data:`m4ov.data.formats.FORMATS`; ``None``: detected, file by file.
        images: ``"no"``: are not looked at; ``"header"``: exist and have a header and a size that can be used;
            ``"decode"``: are decoded.
        threads: that look at images.
        limit: bytes of a line; a longer one is a problem, and is not read into memory.
        keep: problems in the report; the others are counted.
        problems_to: a JSONL file for all problems, a line each; it stands at the end, whole.
        also: raises :class:`RecordError` for what else is wrong with a record (its labels, say).

    Raises:
        ValueError: an argument is wrong (:class:`m4ov.data.formats.FormatError`: there is no such format).
        WriteError: ``problems_to`` cannot be written.
    """
    if images not in ("no", "header", "decode"):
        raise ValueError(f"validate: images: expected no, header or decode; got {images!r}")
    if threads < 1:
        raise ValueError(f"validate: threads: expected 1 or more; got {threads}")
    form = None if format is None else named(format)
    sources = [paths] if isinstance(paths, str | Path) else list(paths)
    report, seen = Report(), set[str]()
    with ExitStack() as stack:
        written = None
        if problems_to is not None:
            written = stack.enter_context(stack.enter_context(replacing(Path(problems_to))).open("w", encoding="utf-8"))

        def wrong(problem: RecordError) -> None:
            report.counts[problem.kind] += 1
            if len(report.problems) < keep:
                report.problems.append(problem)
            if written is not None:
                written.write(json.dumps(problem.to_json()) + "\n")

        pool = stack.enter_context(ThreadPoolExecutor(threads)) if images != "no" else None
        for source in sources:
            try:
                files = files_of(source)
            except RecordError as error:
                wrong(error)
                continue
            for path in files:
                report.files.append(_file(path, form, limit, pool, images == "decode", seen, also, wrong))
    return report


def _file(
    path: Path,
    form: Format | None,
    limit: int,
    pool: ThreadPoolExecutor | None,
    decode: bool,
    seen: set[str],
    also: Callable[[Record, Where], None] | None,
    wrong: Callable[[RecordError], None],
) -> FileReport:
    name = form.name if form is not None else "?"
    if form is None:
        try:
            form = detect(path, limit=limit)
            name = form.name
        except FormatError as error:
            rows, readable = 0, False
            for where, value in rows_of(path, limit):
                rows += bool(where.line)
                readable = readable or not isinstance(value, RecordError)
                if isinstance(value, RecordError):
                    wrong(value)
            if readable:
                wrong(RecordError(Where(str(path)), "", "format", str(error).removeprefix(f"{path}: ")))
            return FileReport(path, name, rows, 0, 0)
    rows = right = shown = 0
    waiting: deque[tuple[bool, list[RecordError], Future[list[RecordError]] | None]] = deque()

    def settle(left: int) -> None:
        nonlocal right
        while len(waiting) > left:
            fine, problems, future = waiting.popleft()
            problems += future.result() if future is not None else []
            for problem in problems:
                wrong(problem)
            right += fine and not problems

    for where, value in rows_of(path, limit):
        rows += bool(where.line)
        record, problems = _checked(form, where, value, seen, also)
        future = None
        if record is not None:
            shown += len(record.images)
            if pool is not None and record.images:
                future = pool.submit(_images, record, where, decode)
        waiting.append((record is not None, problems, future))
        settle(_WAITING)
    settle(0)
    return FileReport(path, name, rows, right, shown)


def _checked(
    form: Format, where: Where, value: Any, seen: set[str], also: Callable[[Record, Where], None] | None
) -> tuple[Record | None, list[RecordError]]:
    try:
        if isinstance(value, RecordError):
            raise value
        record = convert_row(form, value, where)
    except RecordError as error:
        return None, [error]
    problems = []
    if any(value.get(name) is not None for name in (*IDS, KEY)):  # others are named by their place
        if record.id in seen:
            problem = f"{short(record.id)} was there before"
            problems.append(RecordError(where, "id", "duplicate id", problem, record.id))
        seen.add(record.id)
    if also is not None:
        try:
            also(record, where)
        except RecordError as error:
            problems.append(error)
    return record, problems


def _images(record: Record, where: Where, decode: bool) -> list[RecordError]:
    folder = Path(where.file).parent

    def problem_of(reference: str) -> str | None:
        try:
            image_header(reference, folder)
            if decode:
                load_image(reference, folder)
        except ImageError as error:
            return str(error)
        return None

    found = ((place, problem_of(reference)) for place, reference in enumerate(record.images))
    return [RecordError(where, f"images[{place}]", "image", problem, record.id) for place, problem in found if problem]

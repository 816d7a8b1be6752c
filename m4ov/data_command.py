"""``m4ov data build RECIPE``: data produced by a recipe. ``m4ov data validate FILE…``: files of records checked."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m4ov.data_recipe import DataBuildConfig

if TYPE_CHECKING:
    from rich.console import Console

#: What a build needs beside torch: module → package.
_NEEDS = {
    "PIL": "pillow",
    "jsonschema": "jsonschema",
    "imagehash": "ImageHash",
    "datasketch": "datasketch",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser("build", help="produce data by a recipe; the same command goes on where it was")
    build.add_argument("recipe", metavar="RECIPE", help="a name (data) or the path of a .yaml file")
    build.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. allot.questions=2000 engine.kind=ray")
    validate = actions.add_parser("validate", help="check files of records; names file, line and field")
    validate.add_argument("files", nargs="+", metavar="FILE", help="a file in any known format, or a folder of such")
    validate.add_argument("--format", metavar="F", help="its name (default: detected, file by file)")
    validate.add_argument(
        "--images", default="header", metavar="HOW", help="no, header (they exist and have a size), decode: all of them"
    )
    validate.add_argument("--labels", action="store_true", help="every record has its paths in the two label trees")
    validate.add_argument("--problems", type=Path, metavar="FILE", help="write all problems there, one a line")
    validate.add_argument("--json", type=Path, metavar="FILE", help="write the report there")


def prepare(options: argparse.Namespace) -> DataBuildConfig | None:
    """The recipe's configuration; needs no torch, so that a mistake is answered at once."""
    if options.action != "build":
        if options.images not in ("no", "header", "decode"):
            raise ValueError(f"--images: expected no, header or decode; got {options.images}")
        return None
    from m4ov import config

    path = config.find(options.recipe)
    task = config.task(path, options.overrides)
    if task != "data":
        given = "names no task" if task is None else f"has the task {task!r}"
        raise config.ConfigError(f"{path} {given}; `m4ov data build` needs a recipe with task: data")
    return config.load(DataBuildConfig, path, options.overrides)


def execute(options: argparse.Namespace, prepared: DataBuildConfig | None) -> int:
    """Exit status 1: a file has lines that are no records."""
    if options.action == "build":
        assert prepared is not None
        run(prepared)
        return 0
    return _validate(options)


def run(config: DataBuildConfig) -> None:
    """Produce data, write the report, and print what came out.

    Raises:
        RunFolderError, BuildError, DataError, LabelError, WriteError, ValueError: one line says what is wrong.
        KeyboardInterrupt: Ctrl-C; the same command goes on.
    """
    from rich.console import Console

    from m4ov.train.folder import RunFolder

    require()
    folder = RunFolder(config.run.folder, {"task": "data"})
    try:
        _build(config, Console())
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(str(interrupt) or "stopped; the same command goes on where it was") from None
    finally:
        folder.close()


def require() -> None:
    """Raises ``ValueError`` where a package is missing that data production needs."""
    missing = [package for module, package in _NEEDS.items() if not importlib.util.find_spec(module)]
    if missing:
        raise ValueError(f"data production needs {', '.join(missing)}: pip install 'm4ov[data]'")


def _build(config: DataBuildConfig, console: Console) -> None:
    from m4ov.data import production
    from m4ov.data.production import report

    began = time.perf_counter()
    with Progress(console, production.STEPS) as progress:
        found = production.build(config, progress.watch)
    seconds = time.perf_counter() - began
    covered = report.write(found, config, seconds)
    report.print_table(found, config, seconds, console)
    if covered.refused:
        console.print(f"records whose labels are in no tree: {sum(covered.refused.values())}")


class Progress:
    """A bar for each step in a terminal, a line for each elsewhere."""

    def __init__(self, console: Console, steps: dict[str, str]) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self.console, self.steps = console, steps
        self._begun: dict[str, Any] = {}
        self._bars = Bars(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=4,
        )

    def watch(self, step: str, shards: int, done: int) -> None:
        """See :data:`m4ov.data.production.flow.Watch`."""
        if step not in self._begun:
            self._begun[step] = self._bars.add_task(self.steps[step], total=shards)
            if not self.console.is_terminal:
                there = f", {done} are there" if done else ""
                self.console.print(f"{self.steps[step]} ({shards} {'shard' if shards == 1 else 'shards'}{there})")
        self._bars.update(self._begun[step], completed=done)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()


def _validate(options: argparse.Namespace) -> int:
    from rich.console import Console

    from m4ov.data.labels import check_labels
    from m4ov.data.records import Record, RecordError, Where
    from m4ov.data.validation import validate
    from m4ov.data.whole import write_whole

    def labelled(record: Record, where: Where) -> None:
        for problem in check_labels(record):
            raise RecordError(where, f"labels.{problem.tree}", f"label {problem.kind}", problem.problem, record.id)

    report = validate(
        [Path(file) for file in options.files],
        options.format,
        images=options.images,
        problems_to=options.problems,
        also=labelled if options.labels else None,
    )
    report.render(Console())
    if options.json:
        write_whole(options.json, json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n")
    return 0 if report.ok else 1

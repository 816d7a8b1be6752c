"""A benchmark from its files to what came of it: asked once, read by every rule, and a record of each question."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from m4ov.data.teacher import Teacher
from m4ov.data.whole import write_whole
from m4ov.evaluate import answered
from m4ov.evaluate.asking import Asking, Said
from m4ov.evaluate.benchmarks import Benchmark, Question
from m4ov.evaluate.scoring import Outcome, outcome, score
from m4ov.train.folder import RunFolder, RunFolderError

Ask = Callable[[Iterable[Asking]], Iterator[tuple[Asking, Said]]]
_STEP_BYTES = 2**22


def identity(paths: Sequence[Path]) -> str:
    """A digest of files' contents, in the order of their names.

    Raises:
        OSError: one cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(path.name.encode() + b"\0" + path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while data := file.read(_STEP_BYTES):
                digest.update(data)
    return digest.hexdigest()


def chosen(questions: Sequence[Question], limit: int) -> list[Question]:
    """The questions of ``limit`` groups, spread evenly; 0: all. A group is asked whole."""
    groups = list(dict.fromkeys(question.group for question in questions))
    if not limit or limit >= len(groups):
        return list(questions)
    wanted = {groups[place * len(groups) // limit] for place in range(limit)}
    return [question for question in questions if question.group in wanted]


def run(
    benchmark: Benchmark,
    files: Sequence[Path],
    folder: RunFolder,
    ask: Ask,
    *,
    limit: int = 0,
    teacher: Teacher | None = None,
    base: Path | None = None,
    progress: Callable[[int, int], object] = lambda done, of: None,
) -> Outcome:
    """Ask what has not been answered yet, read every answer by every rule, write the records.

    In the folder: ``NAME.run.json`` (what was asked), ``NAME.answers.jsonl`` (one a line, as they come) and
    ``NAME.jsonl`` (the records: prompt, answer, what each rule extracts, its verdict; written whole at the end).

    Args:
        files: of the benchmark.
        folder: claimed by the model and how it is asked.
        ask: gives an answer to each of these, in any order.
        limit: see :func:`chosen`.
        base: the folder of a run of the language model beneath (``benchmark.blind``).
        progress: called with the number of answers that are there, and of all, at the beginning and after each.

    Raises:
        RecordError, ImageError, ValueError: a row, an image or a file of answers is none.
        RunFolderError: the folder holds answers to other questions.
    """
    everything = benchmark.read(files)
    questions = chosen(everything, limit)
    asked = hashlib.blake2b(json.dumps([one.text for one in everything]).encode(), digest_size=16)
    what = {"data": identity(files), "prompts": asked.hexdigest()}
    folder.claim(what, f"{benchmark.name}.run.json")
    askings = [Asking(question) for question in questions]
    if benchmark.blind:
        askings += [Asking(question, blind=True) for question in questions]
    path = folder.path / f"{benchmark.name}.answers.jsonl"
    answers = answered.read(path, askings)
    progress(len(answers), len(askings))
    missing = [asking for asking in askings if asking not in answers]
    if missing:
        for asking, said in answered.keep(path, ask(missing)):
            answers[asking] = said
            progress(len(answers), len(askings))
    scored = score(benchmark, {asking: answers[asking] for asking in askings}, teacher)
    lines = (json.dumps(one.to_json(benchmark.name), ensure_ascii=False) + "\n" for one in scored)
    write_whole(folder.path / f"{benchmark.name}.jsonl", "".join(lines))
    beneath = _beneath(benchmark, base, what, askings) if base is not None and benchmark.blind else {}
    return outcome(benchmark, scored, score(benchmark, beneath, teacher))


def _beneath(benchmark: Benchmark, base: Path, what: dict[str, str], askings: Sequence[Asking]) -> dict[Asking, Said]:
    """The answers of another run to the same questions without images."""
    path = base / f"{benchmark.name}.run.json"
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--text-base: {path}: expected what a run of {benchmark.name} wrote ({error})") from None
    if there != what:
        raise ValueError(f"--text-base: {path}: expected a run on the same files, got another")
    found = answered.read(base / f"{benchmark.name}.answers.jsonl", [one for one in askings if one.blind])
    if not found:
        raise ValueError(f"--text-base: {base}: expected answers without images, got none")
    return found


def claimed(folder: Path, how: dict[str, Any]) -> RunFolder:
    """The folder of a run, which this process alone writes to.

    Raises:
        RunFolderError: it cannot be written, another process uses it, or it holds answers of another model, or to
            another way of asking.
    """
    try:
        return RunFolder(folder, how)
    except RunFolderError as error:
        raise RunFolderError(str(error).replace("run.folder=PATH", "--out DIR")) from None

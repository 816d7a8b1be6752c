"""The answers of a run in a file, one a line as they come, so that the same command goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from m4ov.data.records import short
from m4ov.data.whole import write_whole
from m4ov.evaluate.asking import Asking, Said

_FIELDS = {"id": str, "with_image": bool, "answer": str, "finish": str, "tokens": int, "problem": str}


class AnswersError(ValueError):
    """A file of answers that is none; the message names file and line."""


def read(path: Path, askings: Sequence[Asking]) -> dict[Asking, Said]:
    """The answers in a file to these questions, in their order; those to others are passed over. No file: none.

    A last line without its end is what a process that was killed left behind: it is no answer.

    Raises:
        AnswersError: another line is none, or one question was answered twice.
    """
    wanted = {asking.key: asking for asking in askings}
    found: dict[tuple[str, bool], Said] = {}
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise AnswersError(f"{path}, line {number}: not JSON ({error})") from None
        key, said = _said(value, path, number)
        if key in found:
            raise AnswersError(f"{path}, line {number}: id: {short(key[0])} was answered before")
        found[key] = said
    return {asking: found[key] for key, asking in wanted.items() if key in found}


def keep(path: Path, answers: Iterable[tuple[Asking, Said]]) -> Iterator[tuple[Asking, Said]]:
    """The same answers, each written at the end of the file before it is handed on.

    Raises:
        OSError: the file cannot be written.
    """
    lines = _whole_lines(path)
    if path.exists() and path.stat().st_size != sum(map(len, lines)):  # a torn line at the end
        write_whole(path, b"".join(lines))
    with path.open("ab") as file:
        for asking, said in answers:
            row = {"id": asking.question.id, "with_image": not asking.blind, "answer": said.answer}
            row |= {"finish": said.finish, "tokens": said.tokens, "problem": said.problem}
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            file.flush()
            yield asking, said


def _whole_lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _said(value: Any, path: Path, number: int) -> tuple[tuple[str, bool], Said]:
    for name, kind in _FIELDS.items():
        if not isinstance(value, dict) or type(value.get(name)) is not kind:
            got = short(value.get(name) if isinstance(value, dict) else value)
            raise AnswersError(f"{path}, line {number}: {name}: expected a {kind.__name__}, got {got}")
    said = Said(value["answer"], value["finish"], value["tokens"], value["problem"])
    return (value["id"], not value["with_image"]), said

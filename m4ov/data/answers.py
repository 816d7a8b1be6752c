"""What a teacher answers, as JSON of a stated form or not at all."""

from __future__ import annotations

import json
from typing import Any

from m4ov.data.records import short
from m4ov.data.teacher import Reply, TeacherError

MAX_CHARACTERS = 2**20
_FENCE = "```"


class AnswerError(ValueError):
    """A teacher's answer cannot be used; the message says why."""


def parse_answer(answer: Reply | TeacherError, schema: dict[str, Any]) -> Any:
    """The JSON value that is the whole answer, or the whole of one fenced block that is the whole answer.

    Args:
        answer: as ``Teacher.ask_many`` gives it.
        schema: JSON Schema 2020-12, which the value must meet.

    Raises:
        AnswerError: there was no answer, it is longer than a MiB, not strict JSON (a name twice, NaN, text around it),
            or does not meet the schema; the first place where it does not.
    """
    if isinstance(answer, TeacherError):
        raise AnswerError(f"no answer: {answer}")
    text = answer.text
    if len(text) > MAX_CHARACTERS:
        raise AnswerError(f"too long: {len(text)} characters; at most {MAX_CHARACTERS} are read")
    try:
        value = json.loads(_unfenced(text.strip()), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise AnswerError(f"not JSON ({error}): {short(text)}") from None
    problem = mismatch(value, schema)
    if problem:
        raise AnswerError(problem)
    return value


def mismatch(value: Any, schema: dict[str, Any]) -> str:
    """Where and how a value misses a JSON Schema; empty if it meets it."""
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        raise ModuleNotFoundError("checking a teacher's answers needs jsonschema; pip install 'm4ov[data]'") from None
    try:
        errors = list(Draft202012Validator(schema).iter_errors(value))
    except RecursionError:
        return "nested too deeply"
    if not errors:
        return ""
    path, message = min((error.json_path, error.message) for error in errors)
    return f"not as the schema has it, at {path}: {message if len(message) <= 200 else message[:200] + '…'}"


def _unfenced(text: str) -> str:
    first, _, rest = text.partition("\n")
    if first.rstrip() in (_FENCE, f"{_FENCE}json") and rest.endswith(_FENCE):
        return rest.removesuffix(_FENCE)
    return text


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError(f"a name stands twice in {short(', '.join(name for name, _ in pairs))}")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")

"""A teacher for tests of what is done with answers: it says what it was given to say, and keeps what it was asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m4ov.data.teacher import Reply, TeacherError


class Scripted:
    """Says ``answers`` in order: texts, replies or errors."""

    name = "scripted"

    def __init__(self, answers: Sequence[str | Reply | TeacherError]) -> None:
        self.answers = list(answers)
        self.asked: list[list[dict[str, Any]]] = []

    def ask_many(
        self,
        requests: Sequence[list[dict[str, Any]]],
        *,
        max_tokens: int = 1024,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Reply | TeacherError]:
        self.asked += requests
        said, self.answers = self.answers[: len(requests)], self.answers[len(requests) :]
        return [Reply(answer, 10, 5) if isinstance(answer, str) else answer for answer in said]

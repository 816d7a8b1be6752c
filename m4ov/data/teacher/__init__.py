"""Who answers questions about images while data is made: one interface, whoever stands behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Reply:
    """An answer. ``cached``: it was answered before, and costs nothing."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False


class TeacherError(RuntimeError):
    """A request that stayed without an answer after all retries; the message says what came instead."""


class Teacher(Protocol):
    """Answers requests, each a list of OpenAI chat messages; how many at once is the teacher's affair."""

    name: str

    def ask_many(
        self,
        requests: Sequence[list[dict[str, Any]]],
        *,
        max_tokens: int = 1024,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Reply | TeacherError]:
        """Answers in the order of the requests. A request that failed has its error in its place."""
        ...


__all__ = ["Reply", "Teacher", "TeacherError"]

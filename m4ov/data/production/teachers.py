"""The teacher of a step: made once a process, watched for failing too often, its answers counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from m4ov.data.production.steps import BuildError, Task, add, dump
from m4ov.data.teacher import Reply, Teacher, TeacherError
from m4ov.data.teacher.embedded import EmbeddedTeacher
from m4ov.data.teacher.tasks import Messages
from m4ov.data_recipe import TeacherConfig


def settings(config: TeacherConfig) -> dict[str, Any]:
    """What answers depend on."""
    return {"kind": config.kind, "model": config.model, "max_tokens": config.max_tokens}


def context(config: TeacherConfig, folder: Path, workers: int) -> dict[str, Any]:
    """What a teacher needs beside; limits are shared by the workers."""
    return {
        "base_url": config.base_url,
        "api_key_env": config.api_key_env,
        "concurrency": max(1, config.concurrency // workers),
        "requests_per_minute": config.requests_per_minute / workers,
        "timeout_seconds": config.timeout_seconds,
        "deadline_seconds": config.deadline_seconds,
        "retries": config.retries,
        "cache": config.cache or str(folder / "teacher-cache"),
        "prompt_price": config.prompt_price,
        "completion_price": config.completion_price,
        "max_failures": config.max_failures,
    }


def sees(task: Task) -> bool:
    """Whether the teacher looks at images."""
    return bool(task.settings["teacher"]["kind"] == "http")


def teacher_of(task: Task) -> Teacher:
    """The teacher of a task."""
    if not sees(task):
        return EmbeddedTeacher()
    given = {name: value for name, value in task.context["teacher"].items() if name != "max_failures"}
    return _http(dump({"model": task.settings["teacher"]["model"], **given}))


@lru_cache(maxsize=4)
def _http(given: str) -> Teacher:
    from m4ov.data.teacher.http import HttpTeacher

    return HttpTeacher(**json.loads(given))


class Watched:
    """The teacher of a task, whose answers are counted.

    Args:
        task: its settings and context say who the teacher is.
        counts: gets what follows from requests and answers.
        spent: gets what this run paid for: nothing, where answers came from the cache.
    """

    def __init__(self, task: Task, counts: dict[str, int], spent: dict[str, float]) -> None:
        self.task, self.counts, self.spent = task, counts, spent
        self.teacher = teacher_of(task)
        self.name = self.teacher.name

    def ask_many(
        self,
        requests: Sequence[Messages],
        *,
        max_tokens: int = 1024,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Reply | TeacherError]:
        """See :class:`m4ov.data.teacher.Teacher`.

        Raises:
            BuildError: a larger share of the requests failed than ``teacher.max_failures``. Nothing of the shard is
                kept but the answers in the cache.
        """
        if not requests:
            return []
        answers = self.teacher.ask_many(requests, max_tokens=max_tokens, temperature=temperature, seed=seed)
        errors = [answer for answer in answers if isinstance(answer, TeacherError)]
        replies = [answer for answer in answers if isinstance(answer, Reply)]
        given = self.task.context["teacher"]
        # The embedded teacher fails where the truth is malformed, which is the image's fault alone.
        if sees(self.task) and len(errors) > given["max_failures"] * len(requests):
            failed = f"the teacher at {given['base_url']} failed {len(errors)} of {len(requests)} requests"
            allowed = f"teacher.max_failures={given['max_failures']:g}"
            raise BuildError(f"{self.task.name}: {failed} ({allowed}); the first: {errors[0]}")
        paid = [reply for reply in replies if not reply.cached]
        add(self.counts, {"requests": len(requests), "requests_failed": len(errors), **_tokens(replies)})
        tokens = _tokens(paid)
        prices = given["prompt_price"], given["completion_price"]
        cost = (tokens["prompt_tokens"] * prices[0] + tokens["completion_tokens"] * prices[1]) / 1e6
        cached = len(replies) - len(paid)
        add(self.spent, {"requests": len(requests) - cached, "cached": cached, **tokens, "cost": cost})
        return answers


def _tokens(replies: Sequence[Reply]) -> dict[str, int]:
    return {
        "prompt_tokens": sum(reply.prompt_tokens for reply in replies),
        "completion_tokens": sum(reply.completion_tokens for reply in replies),
    }

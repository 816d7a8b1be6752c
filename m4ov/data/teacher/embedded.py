"""A teacher without a model or a network: it writes questions whose answers follow from an image's ground truth."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from m4ov.data.records import DIFFICULTIES
from m4ov.data.teacher import Reply, TeacherError
from m4ov.data.teacher.ranks import rank
from m4ov.data.teacher.tasks import task_of
from m4ov.data.teacher.templates import CAPABILITIES, Question, questions


class EmbeddedTeacher:
    """Answers two of the tasks of :mod:`m4ov.data.teacher.tasks` (``match``, ``questions``) from the ``truth`` in them.

    Deterministic: what is chosen, and how it is worded, follows from hashes of seed, image and question.
    """

    name = "embedded"

    def ask_many(
        self,
        requests: Sequence[list[dict[str, Any]]],
        *,
        max_tokens: int = 1024,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Reply | TeacherError]:
        """See :class:`m4ov.data.teacher.Teacher`. ``max_tokens`` and ``temperature`` mean nothing here."""
        return [self._answer(messages) for messages in requests]

    def _answer(self, messages: list[dict[str, Any]]) -> Reply | TeacherError:
        task = task_of(messages)
        name = task["task"] if task else None
        if task is None or name not in ("match", "questions"):
            return TeacherError(f"embedded: expected one of its tasks (match, questions), got {name!r}")
        try:
            found = _match(task) if name == "match" else {"questions": _write(task)}
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            return TeacherError(f"embedded: the truth is malformed ({type(error).__name__}: {error})")
        return Reply(json.dumps(found, ensure_ascii=False))


def _match(task: dict[str, Any]) -> dict[str, Any]:
    truth, topics = task["truth"], task["topics"]
    known = set(task["capabilities"])
    able = {capability(question.kind) for question in questions(truth, "")}
    topic = truth.get("topic")
    if topic is None:
        topic = _nearest(str(truth.get("label", "")), topics)
    return {"topic": topic, "capabilities": sorted(able & known)}


def _nearest(label: str, topics: Iterable[str]) -> str:
    """The topic whose id shares most words with a label; the first of equals; empty: none shares any."""
    words = {word.rstrip("s") for word in label.lower().split()}

    def shared(topic: str) -> int:
        return len(words & {part.rstrip("s") for part in topic.replace("-", ".").replace("_", ".").split(".")})

    best = max(topics, key=shared, default="")
    return best if best and shared(best) else ""


def _write(task: dict[str, Any]) -> list[dict[str, str]]:
    salt = f"{task['seed']}|{task['id']}"
    known = set(task["capabilities"])
    able = [question for question in questions(task["truth"], salt) if capability(question.kind) in known]
    wanted = {name: int(task.get(name, 0)) for name in DIFFICULTIES}
    return [
        {
            "question": question.text,
            "answer": question.answer,
            "difficulty": question.difficulty,
            "capability": capability(question.kind),
            "kind": question.kind,
        }
        for question in _chosen(able, wanted, salt)
    ]


def _chosen(able: list[Question], wanted: dict[str, int], salt: str) -> list[Question]:
    """As many of each difficulty as are wanted; what one lacks is taken from those that are left, nearest first."""
    waiting = {name: _varied([one for one in able if one.difficulty == name], salt) for name in DIFFICULTIES}
    chosen: list[Question] = []
    missing = {}
    for name, count in wanted.items():
        chosen += waiting[name][:count]
        missing[name] = max(0, count - len(waiting[name]))
        waiting[name] = waiting[name][count:]
    for name, count in missing.items():
        place = DIFFICULTIES.index(name)
        for other in sorted(DIFFICULTIES, key=lambda one: abs(DIFFICULTIES.index(one) - place)):
            chosen += waiting[other][:count]
            taken = min(count, len(waiting[other]))
            waiting[other], count = waiting[other][taken:], count - taken
    return chosen


def _varied(able: list[Question], salt: str) -> list[Question]:
    """One question of each kind in turn, in an order that is the image's own."""
    able = sorted(able, key=lambda one: rank(salt, one.text))
    turn: dict[str, int] = {}
    order = []
    for question in able:
        turn[question.kind] = turn.get(question.kind, -1) + 1
        order.append((turn[question.kind], rank(salt, question.kind), question))
    return [question for *_, question in sorted(order, key=lambda entry: entry[:2])]


def capability(kind: str) -> str:
    """The leaf of the shipped tree of capabilities that a kind of question asks for; empty: none."""
    return CAPABILITIES.get(kind, "")

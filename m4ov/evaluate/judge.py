"""An LLM that says which answer a text gives, where a tool's rule asks one; it never says whether it is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from m4ov.data.teacher import Reply, Teacher
from m4ov.evaluate.benchmarks.base import Question

_LONGEST = 200  # characters of a judge's answer; a longer one is no answer
_TOKENS = 64
_NONE = "NONE"
_WANTED = {
    "option": "the letter of the option that the response chooses",
    "integer": "the integer that the response gives, in digits",
    "float": "the number that the response gives, in digits",
    "list": "the list that the response gives, as Python writes it, such as [1, 2]",
    "free": "the number or formula that the response gives",
}


@dataclass(frozen=True)
class Judged:
    """What a judge extracted. ``value``: ``None``: nothing. ``problem``: why there is no judgement; empty: there is."""

    value: str | None
    problem: str = ""


def request(question: Question, answer: str) -> list[dict[str, Any]]:
    """The chat messages that ask for the answer in a text. Our own wording: figures with a judge are not those of a
    tool that asks its judge in other words."""
    options = "".join(f"({letter}) {text}\n" for letter, text in question.options.items())
    text = (
        f"A question was asked and a response was given. Write {_WANTED[question.kind]}, and nothing else. Do not "
        "solve the question and do not correct the response. If the response gives no such answer, or several, write "
        f"{_NONE}.\n\n"
        f"[Question]\n{question.text.strip()}\n\n"
        + (f"[Options]\n{options}\n" if options else "")
        + f"[Response]\n{answer.strip()}\n\n[Extracted answer]\n"
    )
    return [{"role": "user", "content": text}]


def judge(teacher: Teacher, items: Sequence[tuple[Question, str]]) -> list[Judged]:
    """What a judge extracts of answers, greedily. One that gives no answer after its retries extracts nothing; nothing
    is drawn in its place."""
    replies = teacher.ask_many([request(*item) for item in items], max_tokens=_TOKENS, temperature=0.0, seed=0)
    return [_judged(reply) for reply in replies]


def _judged(reply: Reply | Exception) -> Judged:
    if not isinstance(reply, Reply):
        return Judged(None, str(reply))
    text = reply.text.strip()
    if len(text) > _LONGEST:
        return Judged(None, f"a judgement of {len(text)} characters; at most {_LONGEST} are read")
    return Judged(None if text.strip(" .()[]").upper() in ("", _NONE, "Z") else text)

"""What data production asks a teacher, as chat messages, and how its answers are read.

The last line of a request is a JSON object that says the same as the words before it, with all that is known of the
image: a model reads both, the embedded teacher only that line.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m4ov.data.answers import AnswerError, mismatch, parse_answer
from m4ov.data.records import DIFFICULTIES
from m4ov.data.teacher import Reply, TeacherError

_SYSTEM = "You make training data for a vision-language model. Answer with one JSON object and nothing else."
_MATCH = """\
Look at the image. Choose the one topic that it is about, and all capabilities that questions on it could ask for, \
from the ids in the last line. Answer {"topic": id, "capabilities": [id, …]}."""
_QUESTIONS = """\
Look at the image and write questions on it, as many of each difficulty as the last line says. Each must be answerable \
from the image and not without it, must have one short answer that nobody would dispute, and must ask for one of the \
capabilities listed there. What the last line says of the image under "truth" is true; use it, and do not mention it. \
Answer {"questions": [{"question": "…", "answer": "…", "difficulty": "easy|medium|hard", "capability": id}, …]}."""
_WITH_IMAGE = "Answer the question on the image in as few words as possible."
_BLIND = (
    "The question is about an image that you cannot see. Give the most likely answer all the same, in as few words as "
    "possible."
)
_MATCH_SCHEMA = {
    "type": "object",
    "properties": {"topic": {"type": "string"}, "capabilities": {"type": "array", "items": {"type": "string"}}},
    "required": ["topic", "capabilities"],
}
_QUESTIONS_SCHEMA = {"type": "object", "properties": {"questions": {"type": "array"}}, "required": ["questions"]}
_DRAFT_FIELDS = ("question", "answer", "difficulty", "capability", "kind")
_WORDS = {"type": "string", "pattern": r"\S"}
_DRAFT_SCHEMA = {
    "type": "object",
    "properties": {
        "question": _WORDS,
        "answer": {"type": ["string", "number"], "pattern": r"\S"},
        "difficulty": {"enum": list(DIFFICULTIES)},
        "capability": _WORDS,
        "kind": {"type": "string"},
    },
    "required": ["question", "answer", "difficulty", "capability"],
}


@dataclass(frozen=True)
class Draft:
    """A question as a teacher wrote it. ``capability``: id of a leaf of the tree of capabilities."""

    question: str
    answer: str
    difficulty: str
    capability: str
    kind: str = ""


Messages = list[dict[str, Any]]


def data_uri(path: Path) -> str:
    """An image file as OpenAI's servers take it."""
    kinds = {".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".gif": "gif"}
    kind = kinds.get(path.suffix.lower(), "png")
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def match_request(image: str | None, topics: list[str], capabilities: list[str], truth: dict[str, Any]) -> Messages:
    """Which labels of the two trees an image can serve. ``image``: a ``data:`` URI; ``None`` for the embedded one."""
    return _request(_MATCH, {"task": "match", "topics": topics, "capabilities": capabilities, "truth": truth}, image)


def questions_request(
    image: str | None, id: str, counts: dict[str, int], capabilities: list[str], truth: dict[str, Any], seed: int
) -> Messages:
    """Questions on an image: ``counts`` says how many of each difficulty, ``capabilities`` what they may ask for."""
    task = {"task": "questions", "id": id, **counts, "capabilities": capabilities, "truth": truth, "seed": seed}
    return _request(_QUESTIONS, task, image)


def answer_request(image: str | None, question: str) -> Messages:
    """An answer to one question, with the image or (``None``) without."""
    content: list[dict[str, Any]] = [{"type": "text", "text": f"{_WITH_IMAGE if image else _BLIND}\n\n{question}"}]
    if image:
        content.insert(0, {"type": "image_url", "image_url": {"url": image}})
    return [{"role": "user", "content": content}]


def task_of(messages: Messages) -> dict[str, Any] | None:
    """The JSON object of a request's last line, if it has one."""
    content = messages[-1].get("content") if messages else None
    blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
    text = next((block["text"] for block in reversed(blocks) if block.get("type") == "text"), "")
    try:
        task = json.loads(str(text).rsplit("\n", 1)[-1])
    except ValueError:
        return None
    return task if isinstance(task, dict) and "task" in task else None


def read_match(answer: Reply | TeacherError) -> tuple[str, list[str]]:
    """(topic, capabilities) of an answer; whether there are such labels is for others to say.

    Raises:
        AnswerError: it is something else, or there is none.
    """
    value = parse_answer(answer, _MATCH_SCHEMA)
    return value["topic"], list(dict.fromkeys(value["capabilities"]))


def read_questions(answer: Reply | TeacherError) -> list[Draft | AnswerError]:
    """The questions of an answer; one that is malformed has the error in its place.

    Raises:
        AnswerError: it is something else as a whole, or there is none.
    """
    return [_draft(entry) for entry in parse_answer(answer, _QUESTIONS_SCHEMA)["questions"]]


def _draft(entry: Any) -> Draft | AnswerError:
    if problem := mismatch(entry, _DRAFT_SCHEMA):
        return AnswerError(problem)
    words = {name: " ".join(str(value).split()) for name, value in entry.items() if name in _DRAFT_FIELDS}
    return Draft(**words)


def _request(words: str, task: dict[str, Any], image: str | None) -> Messages:
    line = json.dumps(task, ensure_ascii=False)
    content: list[dict[str, Any]] = [{"type": "text", "text": f"{words}\n{line}"}]
    if image:
        content.insert(0, {"type": "image_url", "image_url": {"url": image}})
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": content}]

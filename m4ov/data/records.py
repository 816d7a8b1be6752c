"""The canonical sample: OpenAI-style messages with image blocks, labels, and what preference and RL training need."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

DIFFICULTIES = ("easy", "medium", "hard")
ROLES = ("system", "user", "assistant")
_FIELDS = ("id", "messages", "labels", "difficulty", "kind", "rejected", "reward", "meta")

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 100, 100

#: ``{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "…"}]}``
Message = dict[str, Any]


class Where(NamedTuple):
    """Where a value comes from. ``line``: counted from 1, in a table the row; 0: the file as a whole. ``element``: of
    an array of JSON, which may stand on one line, counted from 1."""

    file: str = ""
    line: int = 0
    element: int = 0


NOWHERE = Where()


class RecordError(ValueError):
    """A record that cannot be used. The message names file, line and field, and what was expected.

    Attributes:
        where: file and line.
        field: such as ``messages[1].content[0].image``; empty: the line or the file as a whole.
        kind: what sort of problem it is, for counts: ``"not JSON"``, ``"role"``, ``"answer"``, ``"image count"``, ….
        problem: what was expected, and what came.
        id: of the record, if it is known.
    """

    def __init__(self, where: Where, field: str, kind: str, problem: str, id: str = "") -> None:
        place = f"{where.file}, line {where.line}" if where.line else where.file
        place += f", element {where.element}" if where.element else ""
        super().__init__(": ".join(part for part in (place, field, problem) if part))
        self.where, self.field, self.kind, self.problem, self.id = where, field, kind, problem, id

    def __reduce__(self) -> Any:
        return RecordError, (self.where, self.field, self.kind, self.problem, self.id)

    def to_json(self) -> dict[str, Any]:
        """A line of a quarantine file."""
        return {
            "file": self.where.file,
            "line": self.where.line,
            "field": self.field,
            "kind": self.kind,
            "problem": self.problem,
            "id": self.id,
        }


@dataclass(frozen=True)
class Record:
    """One sample, as a line of JSONL has it. Made unchecked: :func:`check`, and every reader and writer, check it.

    Attributes:
        id: unique in its data set.
        messages: an optional system turn, then user and assistant in turn, each ``{"role", "content"}`` with a list of
            blocks as content: ``{"type": "text", "text": str}``, and in user turns ``{"type": "image", "image": str}``.
            An image is a path, relative to the folder of the records' file, or a ``data:`` URI. The last turn is an
            assistant's; in a record with ``reward`` it may be a user's, which is to be answered.
        labels: a path in each label tree, by the tree's name: ``{"topic": (L1, L2, L3), "capability": (L1, L2, L3)}``.
        difficulty: ``"easy"``, ``"medium"``, ``"hard"`` or ``None``.
        kind: of the question; free.
        rejected: answers that the last turn is preferred to (DPO, MPO).
        reward: what a reward function needs, as verl has it: ``{"style": "rule", "ground_truth": …}``; any JSON.
        meta: anything else, as JSON has it. ``max_pixels``: the most pixels that each image of the sample is given.
    """

    id: str
    messages: Sequence[Message]
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    difficulty: str | None = None
    kind: str | None = None
    rejected: Sequence[str] = ()
    reward: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> list[str]:
        """Of all turns, in order."""
        return [block["image"] for message in self.messages for block in message["content"] if block["type"] == "image"]

    @property
    def question(self) -> str:
        """The text of the last user turn."""
        return next((text_of(turn) for turn in reversed(self.messages) if turn["role"] == "user"), "")

    @property
    def answer(self) -> str:
        """The text of the last turn, if it is the assistant's; else empty."""
        return text_of(self.messages[-1]) if self.messages and self.messages[-1]["role"] == "assistant" else ""

    @property
    def max_pixels(self) -> int | None:
        """The most pixels that each image of the sample is given; ``None``: what the processor says."""
        return self.meta.get("max_pixels")

    def to_json(self) -> dict[str, Any]:
        """What a line holds; fields that are empty are left out."""
        value: dict[str, Any] = {"id": self.id, "messages": list(self.messages)}
        if self.labels:
            value["labels"] = {tree: list(path) for tree, path in self.labels.items()}
        if self.difficulty is not None:
            value["difficulty"] = self.difficulty
        if self.kind is not None:
            value["kind"] = self.kind
        if self.rejected:
            value["rejected"] = list(self.rejected)
        if self.reward:
            value["reward"] = dict(self.reward)
        if self.meta:
            value["meta"] = dict(self.meta)
        return value

    def to_line(self) -> str:
        """The line, without its end."""
        return json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, value: Any, where: Where = NOWHERE) -> Record:
        """The record of a parsed line. Content that is a string becomes a block of text.

        Raises:
            RecordError: it is not one.
        """
        if not isinstance(value, dict):
            raise RecordError(where, "", "field", f"expected an object, got {short(value)}")
        unknown = [name for name in value if name not in _FIELDS]
        name = value.get("id") if isinstance(value.get("id"), str) else ""
        if unknown:
            raise RecordError(where, short(unknown[0]), "field", f"expected one of {', '.join(_FIELDS)}", str(name))
        messages = value.get("messages")
        if isinstance(messages, list | tuple):
            messages = [_with_blocks(message) for message in messages]
        optional = {name: value[name] for name in _FIELDS[2:] if value.get(name) is not None}
        record = cls(value.get("id", ""), messages, **optional)  # type: ignore[arg-type]
        check(record, where)
        return record


def text_of(message: Message) -> str:
    """The text of a turn's blocks, joined."""
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def image(reference: str) -> dict[str, str]:
    """A block with an image: a path or a ``data:`` URI."""
    return {"type": "image", "image": reference}


def text(words: str) -> dict[str, str]:
    """A block of text."""
    return {"type": "text", "text": words}


def user(*blocks: str | dict[str, str]) -> Message:
    """A user's turn; a string becomes a block of text."""
    return {"role": "user", "content": [text(block) if isinstance(block, str) else block for block in blocks]}


def assistant(words: str) -> Message:
    """An assistant's turn."""
    return {"role": "assistant", "content": [text(words)]}


def check(record: Record, where: Where = NOWHERE) -> None:
    """That a record is as :class:`Record` says. Images are not looked at.

    Raises:
        RecordError: it is not; the first problem, with the name of the field.
    """

    def wrong(name: str, kind: str, problem: str) -> RecordError:
        return RecordError(where, name, kind, problem, record.id if isinstance(record.id, str) else "")

    if not isinstance(record.id, str) or not record.id or not record.id.isprintable():
        raise wrong("id", "id", f"expected a name without control characters, got {short(record.id)}")
    if not isinstance(record.messages, list | tuple) or not record.messages:
        raise wrong("messages", "messages", f"expected a list of turns, got {short(record.messages)}")
    _check_turns(record.messages, bool(record.reward), wrong)
    if not isinstance(record.labels, Mapping):
        raise wrong("labels", "labels", f"expected an object with a path for each tree, got {short(record.labels)}")
    for tree, path in record.labels.items():
        right = isinstance(path, list | tuple) and path and all(isinstance(part, str) and part for part in path)
        if not isinstance(tree, str) or not right:
            raise wrong(f"labels.{tree}", "labels", f"expected a list of names, got {short(path)}")
    if record.difficulty is not None and record.difficulty not in DIFFICULTIES:
        problem = f"expected one of {', '.join(DIFFICULTIES)}, got {short(record.difficulty)}"
        raise wrong("difficulty", "difficulty", problem)
    if record.kind is not None and not isinstance(record.kind, str):
        raise wrong("kind", "field", f"expected a string, got {short(record.kind)}")
    if not isinstance(record.rejected, list | tuple):
        raise wrong("rejected", "rejected", f"expected a list of answers, got {short(record.rejected)}")
    for place, answer in enumerate(record.rejected):
        if not isinstance(answer, str) or not answer.strip() or not _encodes(answer):
            raise wrong(f"rejected[{place}]", "rejected", f"expected an answer, got {short(answer)}")
    if record.rejected and record.messages[-1]["role"] != "assistant":
        raise wrong("rejected", "rejected", "expected an answer that is preferred to them as the last turn")
    for name, value in (("reward", record.reward), ("meta", record.meta)):
        if not isinstance(value, Mapping):
            raise wrong(name, "field", f"expected an object, got {short(value)}")
        try:
            json.dumps(dict(value), allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise wrong(name, "field", f"expected what JSON can hold ({error})") from None
    pixels = record.meta.get("max_pixels")
    if pixels is not None and (isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < 1):
        raise wrong("meta.max_pixels", "field", f"expected a number of pixels, got {short(pixels)}")


def _check_turns(messages: Sequence[Message], open_end: bool, wrong: Any) -> None:
    expected = "user"
    for place, message in enumerate(messages):
        at = f"messages[{place}]"
        if not isinstance(message, dict) or not message.keys() >= {"role", "content"}:
            raise wrong(at, "messages", f"expected an object with role and content, got {short(message)}")
        role = message["role"]
        if role not in ROLES:
            raise wrong(f"{at}.role", "role", f"expected one of {', '.join(ROLES)}, got {short(role)}")
        if role != expected and not (role == "system" and place == 0):
            raise wrong(f"{at}.role", "role", f"expected {expected!r}: user and assistant take turns; got {role!r}")
        extra = [name for name in message if name not in ("role", "content")]
        if extra:
            raise wrong(f"{at}.{extra[0]}", "field", "expected role and content only")
        _check_content(message, at, wrong)
        expected = "assistant" if role == "user" else "user"
    if expected == "assistant" and not open_end:
        raise wrong(f"messages[{len(messages) - 1}]", "answer", "expected an answer after the last user turn, got none")
    if messages[-1]["role"] == "system":
        raise wrong("messages", "messages", "expected a user turn, got a system turn alone")


def _check_content(message: Message, at: str, wrong: Any) -> None:
    content, role = message["content"], message["role"]
    if not isinstance(content, list | tuple):
        raise wrong(f"{at}.content", "messages", f"expected a list of blocks, got {short(content)}")
    found = False
    for place, block in enumerate(content):
        name = f"{at}.content[{place}]"
        what = block.get("type") if isinstance(block, dict) else None
        if what not in ("text", "image"):
            raise wrong(name, "messages", f"expected a block of type text or image, got {short(block)}")
        if block.keys() != {"type", what} or not isinstance(block[what], str):
            raise wrong(name, "messages", f'expected {{"type": "{what}", "{what}": "…"}}, got {short(block)}')
        if not _encodes(block[what]):
            raise wrong(f"{name}.{what}", "encoding", "not Unicode: it has half a surrogate pair")
        if what == "image" and role != "user":
            raise wrong(name, "role", f"an image in a turn of {role}; only the user shows images")
        if what == "image" and not block[what]:
            raise wrong(f"{name}.image", "image", "expected a path, got an empty string")
        found = found or what == "image" or bool(block[what].strip())
    if not found:
        kind = "answer" if role == "assistant" else "messages"
        raise wrong(f"{at}.content", kind, f"expected {'an answer' if role == 'assistant' else 'text'}, got nothing")


def _with_blocks(message: Any) -> Any:
    if isinstance(message, dict) and isinstance(message.get("content"), str):
        return {**message, "content": [text(message["content"])]}
    return message


def _encodes(words: str) -> bool:
    if words.isascii():
        return True
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True


def short(value: Any, size: int = 60) -> str:
    """A value as a message shows it: not longer than a line, however large or deep it is."""
    shown = _REPR.repr(value[: size + 1] if isinstance(value, str) else value)
    return shown if len(shown) <= size else shown[:size] + "…"

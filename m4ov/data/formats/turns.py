"""What the formats share: turns with ``<image>`` in their text, and images as columns have them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from m4ov.data.pictures import to_uri
from m4ov.data.records import Message, Record, RecordError, Where, check, image, short, text

PLACEHOLDER = "<image>"
_SPLIT = re.compile(re.escape(PLACEHOLDER))
#: Where a row may have a name of its own.
IDS = ("id", "uuid")
Row = dict[str, Any]


class FieldError(Exception):
    """A row cannot be read; :func:`made` adds file and line."""

    def __init__(self, field: str, kind: str, problem: str) -> None:
        super().__init__(field, kind, problem)
        self.field, self.kind, self.problem = field, kind, problem


def record_of(
    row: Row,
    where: Where,
    messages: Sequence[Message],
    *,
    rejected: Sequence[str] = (),
    reward: Any = None,
    meta: Mapping[str, Any] | None = None,
) -> Record:
    """The checked record of a row; without an ``id`` of its own it is named by its file and line.

    Raises:
        RecordError: naming file, line and field.
    """
    for name in ("videos", "video", "audios", "audio"):
        if row.get(name):
            raise FieldError(name, name.rstrip("s"), f"a {name.rstrip('s')} cannot be used; images and text can")
    given = next((row[key] for key in IDS if row.get(key) is not None), None)
    name = str(given) if isinstance(given, str | int) and str(given) else _name(where)
    own = {"rejected": list(rejected), "reward": reward, "meta": dict(meta or {})}
    given_too = {key: row[key] for key in ("labels", "difficulty", "kind") if row.get(key) is not None}
    found = Record(name, list(messages), **{key: value for key, value in own.items() if value}, **given_too)
    check(found, where)
    return found


def images_of(row: Row, *names: str) -> list[str]:
    """The images of the first of these columns that there is: a list, or one.

    Raises:
        FieldError: an entry is no image.
    """
    name = next((name for name in names if row.get(name) is not None), "")
    entries = row.get(name)
    if entries is None:
        return []
    if isinstance(entries, (str, bytes, Mapping)):
        return [_reference(entries, name)]
    if not isinstance(entries, list | tuple):
        raise FieldError(name, "image", f"expected images, got {short(entries)}")
    return [_reference(entry, f"{name}[{place}]") for place, entry in enumerate(entries)]


def with_images(
    turns: Sequence[tuple[str, Any]], images: Sequence[str], field: str, *, first: bool = False
) -> list[Message]:
    """Turns (role, content) as messages: each ``<image>`` of a user's text, and each block of an image that has none of
    its own, is the next of ``images``.

    Args:
        field: of the turns, for messages.
        first: where there is no place for any image, they stand before the text of the first user turn (TRL).

    Raises:
        FieldError: there are not as many places as images; content is of an unknown form.
    """
    if first and images and not any(_places(content) for _, content in turns):
        place = next((place for place, (role, _) in enumerate(turns) if role == "user"), None)
        content = None if place is None else turns[place][1]
        if place is not None and isinstance(content, str | list | tuple):
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
            turns = [*turns[:place], ("user", [*[{"type": "image"}] * len(images), *blocks]), *turns[place + 1 :]]
    needed = sum(_places(content) for role, content in turns)
    if needed != len(images):
        problem = f"expected as many images as places for them in the text, {needed}; got {len(images)}"
        raise FieldError("images", "image count", problem)
    left = iter(images)
    return [
        {"role": role, "content": _blocks(content, left, f"{field}[{place}].content")}
        for place, (role, content) in enumerate(turns)
    ]


def turns_of(
    messages: Any, field: str, *, role: str = "role", content: str = "content", roles: Mapping[str, str] | None = None
) -> list[tuple[str, Any]]:
    """(role, content) of a list of objects.

    Args:
        role, content: the names that they have there.
        roles: their names of roles, and ours; others stay as they are, and the check of the record names them.

    Raises:
        FieldError: it is none.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise FieldError(field, "messages", f"expected a list of turns, got {short(messages)}")
    turns = []
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get(role) is None or message.get(content) is None:
            raise FieldError(f"{field}[{place}]", "messages", f"expected {role} and {content}, got {short(message)}")
        given = message[role]
        if not isinstance(given, str):
            raise FieldError(f"{field}[{place}].{role}", "role", f"expected a string, got {short(given)}")
        turns.append(((roles or {}).get(given, given), message[content]))
    return turns


def words(value: Any, field: str) -> str:
    """A text.

    Raises:
        FieldError: it is none.
    """
    if not isinstance(value, str):
        raise FieldError(field, "messages", f"expected a text, got {short(value)}")
    return value


def answer_of(value: Any, field: str) -> str:
    """An answer: a text, or the one turn of an assistant.

    Raises:
        FieldError: it is none.
    """
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping):
        value = value.get("content", value.get("value"))
    if isinstance(value, list | tuple):
        if not all(isinstance(block, Mapping) and block.get("type") == "text" for block in value):
            raise FieldError(field, "rejected", f"expected blocks of text, got {short(value)}")
        value = "".join(str(block.get("text") or "") for block in value)
    if not isinstance(value, str) or not value.strip():
        raise FieldError(field, "answer", f"expected an answer, got {short(value)}")
    return value


def _reference(entry: Any, field: str) -> str:
    """A path, or a ``data:`` URI of bytes (as Hugging Face's datasets have images: ``{"bytes", "path"}``)."""
    if isinstance(entry, Mapping):
        if entry.get("bytes"):
            entry = entry["bytes"]
        else:
            entry = next((entry[name] for name in ("path", "image", "url") if entry.get(name)), None)
    if isinstance(entry, bytes):
        return to_uri(entry)
    if not isinstance(entry, str) or not entry:
        raise FieldError(field, "image", f"expected a path or the bytes of an image, got {short(entry)}")
    return entry


def _places(content: Any) -> int:
    if isinstance(content, str):
        return content.count(PLACEHOLDER)
    blocks = content if isinstance(content, list | tuple) else []
    return sum(isinstance(block, Mapping) and block.get("type") == "image" and not _own(block) for block in blocks)


def _own(block: Mapping[str, Any]) -> Any:
    """The image that a block brings itself."""
    return next((block[name] for name in ("image", "path", "url", "bytes") if block.get(name)), None)


def _blocks(content: Any, images: Any, field: str) -> list[dict[str, str]]:
    if isinstance(content, str):
        blocks = []
        for place, part in enumerate(_SPLIT.split(content)):
            blocks += [image(next(images))] if place else []
            blocks += [text(part)] if part else []
        return blocks
    if not isinstance(content, list | tuple):
        raise FieldError(field, "messages", f"expected a text or a list of blocks, got {short(content)}")
    blocks = []
    for place, block in enumerate(content):
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "text":
            blocks.append(text(words(block.get("text"), f"{field}[{place}].text")))
        elif kind == "image":
            own = _own(block)
            blocks.append(image(next(images) if own is None else _reference(own, f"{field}[{place}].image")))
        elif kind == "image_url":
            url = block.get("image_url")
            url = url.get("url") if isinstance(url, Mapping) else url
            blocks.append(image(_reference(url, f"{field}[{place}].image_url")))
        else:
            raise FieldError(
                f"{field}[{place}]", "messages", f"expected a block of text or an image, got {short(block)}"
            )
    return blocks


def _name(where: Where) -> str:
    file = re.sub(r"\W+", "-", where.file.rsplit("/", 1)[-1])
    return f"{file}-{where.element or where.line:08d}"


def made(convert: Any, row: Any, where: Where) -> Record:
    """``convert(row, where)``, with file and line in what it raises.

    Raises:
        RecordError: naming file, line and field.
    """
    if not isinstance(row, dict):
        raise RecordError(where, "", "field", f"expected an object, got {short(row)}")
    try:
        found: Record = convert(row, where)
    except FieldError as error:
        name = row["id"] if isinstance(row.get("id"), str) else ""
        raise RecordError(where, error.field, error.kind, error.problem, name) from None
    return found

"""OpenAI's chat messages: text, or blocks of ``text`` and ``image_url``. The writer writes them too."""

from __future__ import annotations

from typing import Any

from m4ov.data.formats.turns import Row, record_of, turns_of, with_images
from m4ov.data.records import Message, Record, Where

NAME = "openai"
_ROLES = {"developer": "system"}


def fits(row: Row) -> str | None:
    """Why a row is not of this format; ``None``: it is."""
    if "messages" not in row:
        return "no messages"
    return "messages with a column of images" if {"images", "image"} & row.keys() else None


def convert(row: Row, where: Where) -> Record:
    """A row; its own ``metadata`` goes into ``meta``."""
    turns = turns_of(row.get("messages"), "messages", roles=_ROLES)
    # A text that says "<image>" is a text here: blocks show images.
    blocks = [(role, [{"type": "text", "text": words}] if isinstance(words, str) else words) for role, words in turns]
    meta = row.get("metadata")
    return record_of(row, where, with_images(blocks, [], "messages"), meta=meta if isinstance(meta, dict) else None)


def to_messages(record: Record) -> list[Message]:
    """A record's messages as OpenAI's API takes them, with blocks of ``image_url``."""

    def block(value: dict[str, Any]) -> dict[str, Any]:
        return value if value["type"] == "text" else {"type": "image_url", "image_url": {"url": value["image"]}}

    return [{"role": turn["role"], "content": [block(value) for value in turn["content"]]} for turn in record.messages]

"""Our own records (:class:`m4ov.data.records.Record`)."""

from __future__ import annotations

from m4ov.data.formats.turns import Row
from m4ov.data.records import Record, Where

NAME = "records"


def fits(row: Row) -> str | None:
    """Why a row is not of this format; ``None``: it is."""
    if not {"id", "messages"} <= row.keys():
        return "no id and messages"
    turns = row["messages"] if isinstance(row["messages"], list) else []
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)]
    for block in (block for content in contents if isinstance(content, list) for block in content):
        if not isinstance(block, dict) or (block.get("type") == "image" and "image" not in block):
            return "blocks of images without image"
        if block.get("type") not in ("text", "image"):
            return f"blocks of type {block.get('type')}"
    foreign = row.keys() - {"id", "messages", "labels", "difficulty", "kind", "rejected", "reward", "meta"}
    return f"other fields: {sorted(foreign)[0]}" if foreign else None


def convert(row: Row, where: Where) -> Record:
    """A row."""
    return Record.from_json(row, where)

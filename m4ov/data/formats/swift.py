"""ms-swift: ``messages``, ``images`` and ``rejected_response``; also LLaMA-Factory's ``messages`` with ``images``."""

from __future__ import annotations

from m4ov.data.formats.turns import FieldError, Row, answer_of, images_of, record_of, turns_of, with_images
from m4ov.data.records import Record, Where, short

NAME = "ms-swift"
_OWN = ("rejected_response", "rejected_messages", "objects")


def fits(row: Row) -> str | None:
    """Why a row is not of this format; ``None``: it is."""
    if "messages" not in row:
        return "no messages"
    if any(name in row for name in _OWN):
        return None
    turns = row["messages"] if isinstance(row["messages"], list) else []
    plain = all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns)
    if "images" not in row:
        return "neither images nor one of " + ", ".join(_OWN)
    return None if plain else "contents that are not text"


def convert(row: Row, where: Where) -> Record:
    """A row. A ``rejected_response`` (or some) becomes ``rejected``; ``objects`` go into ``meta``."""
    turns = turns_of(row.get("messages"), "messages")
    rejected = []
    given = row.get("rejected_response")
    if given is not None:
        several = isinstance(given, list | tuple) and all(isinstance(one, str) for one in given)
        answers = given if several else [given]
        rejected = [answer_of(one, "rejected_response") for one in answers]
    elif row.get("rejected_messages") is not None:
        other = turns_of(row["rejected_messages"], "rejected_messages")
        if other[:-1] != turns[:-1] or other[-1][0] != "assistant":
            problem = f"expected the same turns as messages but for the last answer, got {short(other)}"
            raise FieldError("rejected_messages", "rejected", problem)
        rejected = [answer_of(other[-1][1], "rejected_messages")]
    meta = {"objects": row["objects"]} if row.get("objects") else {}
    messages = with_images(turns, images_of(row, "images", "image"), "messages")
    return record_of(row, where, messages, rejected=rejected, meta=meta)

"""TRL: ``messages``; ``prompt`` with ``completion``, or with ``chosen`` and ``rejected``; and ``images``."""

from __future__ import annotations

from typing import Any

from m4ov.data.formats.turns import FieldError, Row, answer_of, images_of, record_of, turns_of, with_images
from m4ov.data.records import Record, Where, short

NAME = "trl"


def fits(row: Row) -> str | None:
    """Why a row is not of this format; ``None``: it is."""
    if {"chosen", "rejected"} <= row.keys() and "instruction" not in row and "conversations" not in row:
        return None
    if "prompt" in row:
        if "reward_model" in row or "data_source" in row:
            return "a prompt with verl's reward_model or data_source"
        return None if "completion" in row else "a prompt without completion, or chosen and rejected"
    if "messages" in row and {"images", "image"} & row.keys():
        return None
    return "neither messages with images, prompt with completion, nor chosen with rejected"


def convert(row: Row, where: Where) -> Record:
    """A row. ``rejected`` becomes ``rejected``; without ``prompt``, the turns that both have are the prompt. Images
    that no block or ``<image>`` has a place for stand before the first user turn's text, as TRL puts them."""
    rejected: list[str] = []
    if row.get("chosen") is not None:
        turns, rejected = _preference(row)
    elif row.get("prompt") is not None:
        turns = [*_turns(row["prompt"], "prompt", "user"), *_turns(row.get("completion"), "completion", "assistant")]
    else:
        turns = turns_of(row.get("messages"), "messages")
    messages = with_images(turns, images_of(row, "images", "image"), "messages", first=True)
    return record_of(row, where, messages, rejected=rejected)


def _preference(row: Row) -> tuple[list[tuple[str, Any]], list[str]]:
    chosen = _turns(row["chosen"], "chosen", "assistant")
    rejected = _turns(row.get("rejected"), "rejected", "assistant")
    if row.get("prompt") is not None:
        prompt = _turns(row["prompt"], "prompt", "user")
    else:
        prompt = chosen[:-1]
        if rejected[:-1] != prompt:
            problem = "expected the turns of chosen but for the last answer, got others"
            raise FieldError("rejected", "rejected", problem)
        chosen, rejected = chosen[-1:], rejected[-1:]
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if len(turns) != 1 or turns[0][0] != "assistant":
            raise FieldError(name, "rejected", f"expected one answer of the assistant, got {short(turns)}")
    return [*prompt, *chosen], [answer_of(rejected[0][1], "rejected")]


def _turns(value: Any, field: str, role: str) -> list[tuple[str, Any]]:
    """Turns, or a text that is the turn of ``role``."""
    return [(role, value)] if isinstance(value, str) else turns_of(value, field)

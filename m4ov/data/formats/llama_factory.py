"""LLaMA-Factory: sharegpt (``conversations`` of from/value, or ``messages``) and alpaca, with ``images``."""

from __future__ import annotations

from typing import Any

from m4ov.data.formats.turns import FieldError, Row, answer_of, images_of, record_of, turns_of, with_images, words
from m4ov.data.records import Record, Where, short

NAME = "llama-factory"
_ROLES = {"human": "user", "gpt": "assistant", "observation": "observation", "function_call": "function_call"}


def fits(row: Row) -> str | None:
    """Why a row is not of this format; ``None``: it is."""
    if "instruction" in row:
        return None if {"output", "chosen"} & row.keys() else "instruction without output"
    if "conversations" not in row:
        return "no conversations (sharegpt) and no instruction (alpaca)"
    turns = row["conversations"]
    first = turns[0] if isinstance(turns, list) and turns else None
    named = isinstance(first, dict) and {"from", "value"} <= first.keys()
    return None if named else "conversations are not objects with from and value"


def convert(row: Row, where: Where) -> Record:
    """A row of either form. ``chosen`` and ``rejected`` (ranking) become the answer and ``rejected``; ``kto_tag`` goes
    into ``meta``."""
    meta = {"kto_tag": row["kto_tag"]} if row.get("kto_tag") is not None else {}
    if "instruction" in row:
        turns, field = _alpaca(row), "instruction"
    else:
        turns = turns_of(row.get("conversations"), "conversations", role="from", content="value", roles=_ROLES)
        field = "conversations"
        if row.get("system"):
            turns.insert(0, ("system", words(row["system"], "system")))
    rejected = []
    if row.get("chosen") is not None:
        turns.append(("assistant", answer_of(row["chosen"], "chosen")))
        rejected.append(answer_of(row.get("rejected"), "rejected"))
    return record_of(
        row, where, with_images(turns, images_of(row, "images", "image"), field), rejected=rejected, meta=meta
    )


def _alpaca(row: Row) -> list[tuple[str, Any]]:
    turns: list[tuple[str, Any]] = []
    if row.get("system"):
        turns.append(("system", words(row["system"], "system")))
    history = row.get("history") or []
    if not isinstance(history, list | tuple):
        raise FieldError("history", "messages", f"expected pairs of question and answer, got {short(history)}")
    for place, pair in enumerate(history):
        question, answer = pair if isinstance(pair, list | tuple) and len(pair) == 2 else (None, None)
        turns += [("user", words(question, f"history[{place}]")), ("assistant", words(answer, f"history[{place}]"))]
    question = words(row["instruction"], "instruction")
    given = words(row.get("input") or "", "input")
    turns.append(("user", "\n".join(part for part in (question, given) if part)))
    if row.get("chosen") is None:
        turns.append(("assistant", words(row.get("output"), "output")))
    return turns

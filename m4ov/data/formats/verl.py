"""verl: ``prompt``, ``images``, ``reward_model`` and ``extra_info``; usually Parquet."""

from __future__ import annotations

from typing import Any

from m4ov.data.formats.turns import FieldError, Row, images_of, record_of, turns_of, with_images
from m4ov.data.records import Record, Where, short

NAME = "verl"
_META = ("data_source", "ability", "extra_info")


def fits(row: Row) -> str | None:
    """Why a row is not of this format; ``None``: it is."""
    if "prompt" not in row:
        return "no prompt"
    return None if "reward_model" in row else "no reward_model"


def convert(row: Row, where: Where) -> Record:
    """A row: turns to be answered; ``reward_model`` becomes ``reward``, the rest goes into ``meta``."""
    reward = row.get("reward_model")
    if not isinstance(reward, dict) or not reward:
        raise FieldError("reward_model", "field", f"expected an object with the ground truth, got {short(reward)}")
    messages = with_images(turns_of(row.get("prompt"), "prompt"), images_of(row, "images", "image"), "prompt")
    meta: dict[str, Any] = {name: row[name] for name in _META if row.get(name) is not None}
    return record_of(row, where, messages, reward=reward, meta=meta)

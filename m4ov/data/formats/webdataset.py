"""webdataset: samples of a tar's members with one name: images, and ``json`` or ``txt``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from m4ov.data.formats import canonical, llama_factory, openai, swift, trl, verl
from m4ov.data.formats.turns import FieldError, Row, record_of, words
from m4ov.data.pictures import to_uri
from m4ov.data.records import Record, Where, assistant, image, short, user

NAME = "webdataset"
#: What a tar's group of members is called in a row: the name that they have in common.
KEY = "__key__"
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
# Where a json may name the tar's images: columns, and keys of turns and blocks.
_COLUMNS = ("images", "image", "messages", "prompt")
_IN_BLOCKS = ("content", "image", "image_url", "url", "path")
_INSIDE = (canonical, verl, swift, trl, openai, llama_factory)


def fits(row: Row) -> str | None:
    """Why a row is not of this format; ``None``: it is."""
    return None if KEY in row else "not a tar of members with one name"


def convert(row: Row, where: Where) -> Record:
    """A sample: what its ``json`` says, if that is in one of the other formats, with the tar's images; or its ``txt``
    (or the ``json``'s ``caption`` or ``text``) as what the assistant says of them."""
    if not isinstance(row.get(KEY), str):
        raise FieldError(KEY, "field", f"expected the members of a tar, got {short(row)}")
    uris = {name: to_uri(row[name]) for name in sorted(row) if name.rsplit(".", 1)[-1].lower() in IMAGES}
    name = str(row[KEY])
    if "json" not in row and "txt" not in row:
        raise FieldError("json", "messages", f"expected a member {name}.json or {name}.txt, got {short(sorted(row))}")
    inside = _json(row["json"]) if "json" in row else {}
    inner = next((form for form in _INSIDE if "json" in row and form.fits(_with(inside, uris)) is None), None)
    if inner is not None:
        return inner.convert({"id": name, **_with(inside, uris, name)}, where)
    said = (
        _text(row["txt"], "txt") if "txt" in row else words(inside.get("caption", inside.get("text")), "json.caption")
    )
    if not uris:
        raise FieldError("jpg", "image", f"expected an image beside {name}.txt, got none")
    turns = [user(*(image(uri) for uri in uris.values())), assistant(said.strip())]
    meta = {key: value for key, value in inside.items() if key not in ("caption", "text", "id")}
    return record_of({"id": inside.get("id", name)}, where, turns, meta=meta)


def _text(data: bytes, field: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise FieldError(field, "encoding", f"not UTF-8 ({error.reason} at byte {error.start})") from None


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(_text(data, "json"))
    except (ValueError, RecursionError) as error:
        raise FieldError("json", "not JSON", f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise FieldError("json", "field", f"expected an object, got {short(value)}")
    return value


def _with(inside: Row, uris: dict[str, str], name: str = "") -> Row:
    """The row with the tar's images: those that it names, else all."""
    known = {form: uri for key, uri in uris.items() for form in (key, f"{name}.{key}")}

    def found(value: Any, names: Sequence[str]) -> Any:
        if isinstance(value, str):
            return known.get(value, value)
        if isinstance(value, list):
            return [found(entry, _IN_BLOCKS) for entry in value]
        if isinstance(value, dict):
            return {key: found(entry, names) if key in names else entry for key, entry in value.items()}
        return value

    row: Row = found(inside, _COLUMNS)
    if uris and not {"images", "image"} & row.keys() and not _shows(row):
        row["images"] = list(uris.values())
    return row


def _shows(row: Row) -> bool:
    """Whether its messages bring their images themselves."""
    turns = row.get("messages")
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    blocks = [
        block for content in contents if isinstance(content, list) for block in content if isinstance(block, dict)
    ]
    return any(block.get("image") or block.get("image_url") for block in blocks)

"""How a checkpoint reads conversations: the tokenizer, the chat format and the image settings of its folder; and the
files of a model that is new."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from m4ov.data.chat import CHATML, PLAIN, ChatFormat
from m4ov.data.pixels import PixelOptions
from m4ov.data.records import short
from m4ov.data.sources import DataError
from m4ov.data.tokenizer import (
    IMAGE,
    TURN_END,
    TURN_START,
    VIDEO,
    VISION_END,
    VISION_START,
    to_hugging_face,
    token_id,
)

CHATS = {"chatml": CHATML, "plain": PLAIN}
#: What a checkpoint has beside its weights and their configuration.
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "chat_template.json", "preprocessor_config.json"),
    *("video_preprocessor_config.json", "processor_config.json", "generation_config.json"),
)
# What a template is asked: turns in turn, an image, and a system turn before them.
_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": [{"type": "text", "text": "And where is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "On a mat."}]},
]
_SYSTEM: dict[str, Any] = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}


@dataclass(frozen=True)
class Reading:
    """How a model reads conversations.

    Attributes:
        pixels: with the budgets of its processor.
    """

    tokenizer: Tokenizer
    chat: ChatFormat
    pixels: PixelOptions


def reading_of(folder: Path, chat: str = "auto") -> Reading:
    """Of a folder that transformers' ``from_pretrained`` takes.

    Args:
        chat: ``"auto"``: what its chat template makes of turns, or Qwen's own if it has none; or a name of
            :data:`CHATS`, whatever the template says.

    Raises:
        DataError: it has no tokenizer, or one without Qwen's special tokens; no image processor; or a chat template
            that is another.
    """
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "vocab.json")
    ):  # transformers would make an empty one
        raise DataError(f"{folder}: expected a tokenizer (tokenizer.json), got none")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend: Tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # whatever its files make transformers raise
        raise DataError(f"{folder}: expected a tokenizer (tokenizer.json), {_reason(error)}") from error
    try:
        for token in (IMAGE, VIDEO, TURN_START, TURN_END, VISION_START, VISION_END):
            token_id(backend, token)
    except ValueError as error:
        raise DataError(f"{folder}: {error}; expected one of a Qwen3-VL") from None
    try:
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        size: Any = processor.size
        pixels = PixelOptions(
            patch_size=processor.patch_size,
            merge_size=processor.merge_size,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
            temporal_patch_size=processor.temporal_patch_size,
            image_mean=tuple(processor.image_mean),  # type: ignore[arg-type]
            image_std=tuple(processor.image_std),  # type: ignore[arg-type]
        )
    except Exception as error:  # as above
        problem = f"expected an image processor (preprocessor_config.json), {_reason(error)}"
        raise DataError(f"{folder}: {problem}") from error
    return Reading(backend, _chat_of(folder, tokenizer, chat), pixels)


def rendered(chat: ChatFormat, turns: list[dict[str, Any]]) -> str:
    """Turns as the text whose tokens :class:`ChatEncoder` makes, an image as one token."""
    text = ""
    for turn in turns:
        text += chat.roles[turn["role"]]
        for block in turn["content"]:
            text += block["text"] if block["type"] == "text" else f"{VISION_START}{IMAGE}{VISION_END}"
        text += f"{TURN_END}{chat.after}"
    return text


def write_reading(folder: Path, tokenizer: Tokenizer, pixels: PixelOptions) -> None:
    """The files by which transformers, and :func:`reading_of`, read as a new model was trained to (``PLAIN``).

    Raises:
        OSError: they cannot be written.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    to_hugging_face(tokenizer).save_pretrained(folder)
    settings: dict[str, Any] = {
        "patch_size": pixels.patch_size,
        "temporal_patch_size": pixels.temporal_patch_size,
        "merge_size": pixels.merge_size,
        "size": {"shortest_edge": pixels.min_pixels, "longest_edge": pixels.max_pixels},
        "image_mean": list(pixels.image_mean),
        "image_std": list(pixels.image_std),
    }
    Qwen2VLImageProcessorPil(**settings).save_pretrained(folder)
    # Qwen3VLProcessor needs torchvision, for videos; these two files let it load where torchvision is.
    video = {"video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor", **settings}
    _write_json(folder / "video_preprocessor_config.json", video)
    _write_json(folder / "processor_config.json", {"processor_class": "Qwen3VLProcessor"})


def copy_reading(source: Path, folder: Path) -> None:
    """A checkpoint's own such files (:data:`FILES`), as they are.

    Raises:
        OSError: they cannot be read or written.
    """
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _chat_of(folder: Path, tokenizer: Any, chat: str) -> ChatFormat:
    if chat != "auto":
        return CHATS[chat]
    template = tokenizer.chat_template
    if template is None and (folder / "chat_template.json").is_file():  # read by transformers' processors alone
        template = json.loads((folder / "chat_template.json").read_text(encoding="utf-8")).get("chat_template")
    if template is None:
        return CHATML
    try:
        made, other = (
            tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
            for turns in (_TURNS, [_SYSTEM, *_TURNS])
        )
    except Exception as error:  # a template may raise anything
        raise DataError(f"{folder}: its chat template fails ({error}); {_hint()}") from error
    for known in CHATS.values():
        if (made, other) == (rendered(known, _TURNS), rendered(known, [_SYSTEM, *_TURNS])):
            return known
    raise DataError(f"{folder}: its chat template is none that is known; it makes {short(made, 300)}; {_hint()}")


def _hint() -> str:
    return f"data.chat={' or '.join(CHATS)} takes that one all the same"


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"got none that can be read ({lines[0][:200]})"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")

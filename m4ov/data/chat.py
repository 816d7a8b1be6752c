"""Conversations with images of any size as token ids and labels: only what the assistant says counts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from m4ov.data.images import ImageError
from m4ov.data.pictures import image_header
from m4ov.data.pixels import Picture, PixelOptions
from m4ov.data.records import NOWHERE, Message, Record, RecordError, Where
from m4ov.data.tokenizer import IMAGE, TURN_END, TURN_START, VIDEO, VISION_END, VISION_START, token_id

IGNORE = -100


@dataclass(frozen=True)
class ChatFormat:
    """What stands around the content of a turn, which always ends with ``<|im_end|>``.

    Attributes:
        roles: the text before the content, by role; it may begin with ``<|im_start|>``.
        after: the text after ``<|im_end|>``.
    """

    roles: Mapping[str, str]
    after: str = ""


#: Qwen's: what Qwen3-VL's chat template makes of turns of text and images.
CHATML = ChatFormat({role: f"{TURN_START}{role}\n" for role in ("system", "user", "assistant")}, "\n")
#: That of our own small tokenizers (``CHAT_TEMPLATE`` of :mod:`m4ov.data.tokenizer`).
PLAIN = ChatFormat({"system": "", "user": TURN_START, "assistant": ""})


@dataclass(frozen=True)
class Conversation:
    """A record as tokens.

    Attributes:
        input_ids, labels: of each token; labels are -100 outside of the assistant's turns, and not shifted.
        pictures: the images whose tokens are there, in order: all, unless turns were dropped.
        tokens_of_image: as many as each has.
        turns_dropped: at the end, because the record was too long.
        id: the record's.
    """

    input_ids: list[int]
    labels: list[int]
    pictures: tuple[Picture, ...] = ()
    tokens_of_image: tuple[int, ...] = ()
    turns_dropped: int = 0
    id: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class _Tokens:
    """What has been written of a conversation."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], counted: bool = False) -> None:
        self.input_ids += ids
        self.labels += ids if counted else [IGNORE] * len(ids)


class ChatEncoder:
    """Encodes records.

    A special token that stands in a text is text: ``<|image_pad|>`` in a question is no image. The assistant's words
    are encoded apart from what stands before them, as a sampler sees them.

    Args:
        tokenizer: with Qwen's special tokens.
        pixels: how images become tokens.
        chat: what stands around turns.
    """

    def __init__(self, tokenizer: Tokenizer, pixels: PixelOptions, chat: ChatFormat = CHATML) -> None:
        text = tokenizer.to_str()
        self.tokenizer = Tokenizer.from_str(text)  # whose settings are ours
        self._digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True  # as text
        self.pixels, self.chat = pixels, chat
        self.image_token, self.video_token = token_id(tokenizer, IMAGE), token_id(tokenizer, VIDEO)
        self.end_token, self.start_token = token_id(tokenizer, TURN_END), token_id(tokenizer, TURN_START)
        self._vision = token_id(tokenizer, VISION_START), token_id(tokenizer, VISION_END)

    def __call__(
        self, record: Record, folder: Path, *, max_length: int, drop_turns: bool = True, where: Where = NOWHERE
    ) -> Conversation:
        """The tokens of a record. Images are not decoded: their tokens follow from their headers.

        Args:
            folder: that images' paths are relative to.
            max_length: tokens at most. Of a longer record, turns at the end are dropped, whole, so that it ends with an
                answer; no image is ever cut.
            drop_turns: ``False``: a longer record is an error at once.
            where: the record comes from, for messages.

        Raises:
            RecordError: an image has no readable header (kind ``"image"``); the first answer ends beyond
                ``max_length`` (``"too long"``); there is no answer (``"answer"``).
        """
        made, whole, turns = _Tokens(), (0, 0), 0  # whole: tokens and images up to the last answer that fits
        answers = [place for place, turn in enumerate(record.messages) if turn["role"] == "assistant"]
        if not answers:
            raise RecordError(where, "messages", "answer", "expected an answer to learn from, got none", record.id)
        budget = self.pixels.budget(record.max_pixels)
        for place, turn in enumerate(record.messages[: answers[-1] + 1]):
            self._turn(turn, made, budget, place, record, folder, where)
            # What stands after the end of an answer is not needed for it to be whole, but belongs to its turn.
            if len(made.input_ids) > max_length:
                break
            if turn["role"] == "assistant":
                whole, turns = (len(made.input_ids), len(made.images)), place + 1
        dropped = answers[-1] + 1 - turns
        if not turns or (dropped and not drop_turns):
            problem = f"expected at most {max_length} tokens, got {len(made.input_ids)} or more"
            raise RecordError(where, "messages", "too long", problem, record.id)
        tokens, images = whole
        return Conversation(
            made.input_ids[:tokens],
            made.labels[:tokens],
            tuple(Picture(folder, reference, budget) for reference in made.images[:images]),
            tuple(made.counts[:images]),
            dropped,
            record.id,
        )

    def _turn(
        self, turn: Message, made: _Tokens, budget: int, place: int, record: Record, folder: Path, where: Where
    ) -> None:
        before = self.chat.roles[turn["role"]]
        if before.startswith(TURN_START):
            made.add([self.start_token])
            before = before.removeprefix(TURN_START)
        counted = turn["role"] == "assistant"
        if counted:
            made.add(self._text(before))
            before = ""
        for index, block in enumerate(turn["content"]):
            if block["type"] == "text":
                before += block["text"]
                continue
            made.add(self._text(before), counted)
            before = ""
            count = self._image(block["image"], budget, folder, where, f"messages[{place}].content[{index}]", record)
            made.add([self._vision[0], *[self.image_token] * count, self._vision[1]])
            made.images.append(block["image"])
            made.counts.append(count)
        made.add(self._text(before), counted)
        made.add([self.end_token], counted)
        made.add(self._text(self.chat.after))

    def _image(self, reference: str, budget: int, folder: Path, where: Where, name: str, record: Record) -> int:
        try:
            return self.pixels.tokens(*image_header(reference, folder), budget)
        except ImageError as error:
            raise RecordError(where, f"{name}.image", "image", str(error), record.id) from error

    def _text(self, words: str) -> list[int]:
        if not words:
            return []
        ids: list[int] = self.tokenizer.encode(words, add_special_tokens=False).ids
        return ids

    def settings(self) -> dict[str, Any]:
        """What the tokens of a record depend on, as JSON has it."""
        return {
            "tokenizer": self._digest,
            "chat": [*self.chat.roles.values(), self.chat.after],
            "patch_size": self.pixels.patch_size,
            "merge_size": self.pixels.merge_size,
            "min_pixels": self.pixels.min_pixels,
            "max_pixels": self.pixels.max_pixels,
        }

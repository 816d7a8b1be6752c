"""Requests that wait, and the samples that are being drawn: one row of numbers each, so that a step has no loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m4ov.generate import sampling
from m4ov.generate.options import Completion, RequestError, SamplingOptions
from m4ov.models.qwen3_vl import Config
from m4ov_kernels.packing import PackedBatch, Sample

#: A sample that is being drawn. ``slot``: where its tokens are noted; ``prefix``, ``prompt``: its prompt's run of the
#: slab, and that one's length; ``offset``, ``length``: its own, and how much of it is filled; ``delta``: what to add to
#: ``prompt + length`` for the next position; ``token``: drawn last, not read yet; ``count``: of tokens drawn;
#: ``limit``: of them; ``strings``: whether there are strings that end it.
ROW = np.dtype(
    [
        *((name, "i8") for name in ("slot", "prefix", "prompt", "offset", "length", "delta")),
        *((name, "i8") for name in ("token", "count", "limit", "top_k")),
        *(("key", "u8"), ("temperature", "f8"), ("top_p", "f8"), ("strings", "?")),
    ]
)


@dataclass(eq=False)
class Request:
    """A prompt and what was made of it.

    Attributes:
        ends: tokens that end a completion.
        waiting: numbers of the samples that are not begun.
        running: how many are being drawn.
        prefix: while there are some, where in the slab their prompt lies.
        done: of each sample its completion, ``None`` until it is there.
    """

    number: int
    prompt: Sample
    options: SamplingOptions
    ends: frozenset[int]
    limit: int
    waiting: list[int]
    done: list[Completion | None] = field(default_factory=list)
    running: int = 0
    prefix: int = -1

    @property
    def length(self) -> int:
        return self.prompt.input_ids.shape[0]

    @property
    def own(self) -> int:
        """Tokens of the slab that a sample may need for itself: the last one that it draws is never read."""
        return max(1, self.limit - 1)

    def needed(self) -> list[int]:
        """Runs of the slab: the prompt's, and that of each sample that waits."""
        return [self.length, *[self.own] * len(self.waiting)]

    def rows(self, samples: Sequence[int], slots: Sequence[int], offsets: Sequence[int], delta: int) -> np.ndarray:
        """:data:`ROW` of samples whose prompt has been read."""
        rows = np.zeros(len(samples), dtype=ROW)
        rows["slot"], rows["offset"], rows["delta"] = slots, offsets, delta
        rows["prefix"], rows["prompt"] = self.prefix, self.length
        rows["limit"], rows["top_k"], rows["top_p"] = self.limit, self.options.top_k, self.options.top_p
        rows["key"] = sampling.keys(self.options.seed, np.asarray(samples))
        rows["temperature"], rows["strings"] = self.options.temperature, bool(self.options.stop)
        return rows


def checked(
    where: str, prompt: Sample, options: SamplingOptions, config: Config, window: int, end_token_ids: frozenset[int]
) -> Request:
    """A request without a number.

    Raises:
        RequestError: naming ``where``: the prompt is empty, of unknown tokens, as long as the window, or its image and
            video tokens are not as many as the features of its images and videos.
    """
    if not isinstance(prompt, Sample):
        raise RequestError(f"{where}: expected a m4ov_kernels.packing.Sample, got {type(prompt).__name__}")
    ids = prompt.input_ids
    if isinstance(ids, Tensor) and ids.numel() == 0:
        raise RequestError(f"{where}: expected at least one token, got none")
    try:
        pack([prompt], config)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{where}: {str(error).removeprefix('PackedBatch: ')}") from error
    words, length = config.text.vocab_size, ids.shape[0]
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= words:
        raise RequestError(f"{where}: expected token ids of 0 to {words - 1}, got {least if least < 0 else most}")
    if length >= window:
        raise RequestError(f"{where}: expected fewer tokens than the window's {window}, got {length}")
    unknown = [token for token in options.stop_token_ids if token >= words]
    if unknown:
        raise RequestError(f"{where}: stop_token_ids: expected token ids of 0 to {words - 1}, got {unknown[0]}")
    ends = frozenset(options.stop_token_ids) | (frozenset() if options.ignore_end else end_token_ids)
    limit = min(options.max_tokens, window - length)
    count = options.samples
    return Request(-1, prompt, options, ends, limit, list(range(count)), [None] * count)


def pack(prompts: Sequence[Sample], config: Config) -> PackedBatch:
    """Prompts in one row; an image that several of them hold is in it once."""
    return PackedBatch.from_samples(
        prompts,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        merge_size=config.vision.spatial_merge_size,
    )


class Log:
    """The tokens that the samples have drawn and their log-probabilities, by slots."""

    def __init__(self) -> None:
        self.tokens = np.zeros((0, 0), dtype=np.int64)
        self.logprobs = np.zeros((0, 0), dtype=np.float32)
        self._free: list[int] = []

    def take(self, count: int, width: int) -> list[int]:
        """Slots for ``count`` samples of at most ``width`` tokens."""
        slots, columns = self.tokens.shape
        missing = count - len(self._free)
        if missing > 0 or width > columns:
            shape = (slots + max(missing, 0), max(width, columns))
            for name in ("tokens", "logprobs"):
                old = getattr(self, name)
                wider = np.zeros(shape, dtype=old.dtype)
                wider[:slots, :columns] = old
                setattr(self, name, wider)
            self._free += range(slots, shape[0])
        return [self._free.pop() for _ in range(count)]

    def put(self, rows: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """The next token of each."""
        places = rows["slot"], rows["count"]
        self.tokens[places], self.logprobs[places] = tokens, logprobs

    def give_back(self, slot: int, count: int) -> tuple[Tensor, Tensor]:
        """What a sample drew; its slot is free then."""
        self._free.append(slot)
        return torch.from_numpy(self.tokens[slot, :count].copy()), torch.from_numpy(self.logprobs[slot, :count].copy())


def text_until(tokenizer: Any, tokens: list[int], stop: Sequence[str]) -> tuple[str, bool]:
    """The text of tokens, cut where the first of the strings begins, and whether there is one."""
    text: str = tokenizer.decode(tokens)
    places = [place for place in map(text.find, stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)

"""Answers to held-out records: exact match where they are short, and a few that are generated."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from m4ov.data import ImageError
from m4ov.data.packing import IGNORE
from m4ov.data.pictures import load_image
from m4ov.data.pixels import Picture, patches_of
from m4ov.data.rows import RecordRows
from m4ov.evaluate.accuracy import Accuracy
from m4ov.evaluate.examples import Example
from m4ov.models.qwen3_vl import Qwen3VL

_SIDE = 256  # pixels of an example's image in the report


def answer_of(labels: list[int]) -> tuple[int, int]:
    """Where the last answer of a conversation begins and ends, its end token included."""
    end = len(labels)
    while end and labels[end - 1] == IGNORE:
        end -= 1
    begin = end
    while begin and labels[begin - 1] != IGNORE:
        begin -= 1
    return begin, end


@torch.no_grad()
def last_answers(model: Qwen3VL, rows: RecordRows, *, short: int) -> Accuracy | None:
    """Exact match of the last answers that have at most ``short`` tokens, their end token included; ``None``: there are
    none. The turns before them are given as they are. See :func:`m4ov.evaluate.accuracy.exact_match` for what counts.
    """
    model.eval()
    kinds: dict[str, tuple[int, int]] = {}
    right: list[bool] = []
    said: list[str] = []
    for row in range(len(rows)):
        if not any(_short(rows, place, short) for place in rows.rows[row]):
            continue
        places, batch = rows.batch(row)
        hidden_states = model(batch).hidden_states
        for place, offset in zip(places, batch.cu_seqlens.tolist(), strict=False):
            if not _short(rows, place, short):
                continue
            made = rows.made[place]
            begin, end = answer_of(made.labels)
            found = model.lm_head(hidden_states[offset + begin - 1 : offset + end - 1]).argmax(-1).tolist()
            right.append(found == made.labels[begin:end])
            said.append(_text(rows, found))
            kind = rows.records[place].kind or "all"
            hits, asked = kinds.get(kind, (0, 0))
            kinds[kind] = (hits + right[-1], asked + 1)
    return Accuracy("held-out", dict(sorted(kinds.items())), tuple(right), tuple(said)) if right else None


@torch.no_grad()
def answered(model: Any, rows: RecordRows, count: int, *, short: int, seed: int) -> list[Example]:
    """Greedy answers, token after token, of transformers' class to the last questions of ``count`` records that show an
    image and have an answer of at most ``short`` tokens, drawn by ``seed``; of different images, as far as there are.
    """
    order = np.random.default_rng(seed).permutation(len(rows.made)).tolist()
    found: list[int] = []
    seen: set[Picture] = set()
    for place in order:
        pictures = rows.made[place].pictures
        if len(found) < count and pictures and pictures[0] not in seen and _short(rows, place, short):
            seen.add(pictures[0])
            found.append(place)
    made = (_answered(model, rows, place, short) for place in found)
    return [example for example in made if example is not None]


def _answered(model: Any, rows: RecordRows, place: int, short: int) -> Example | None:
    record, made, encoder = rows.records[place], rows.made[place], rows.encoder
    patches = patches_of(made.pictures, encoder.pixels, rows.dtype)
    shown = [found for picture in made.pictures if not isinstance(found := patches[picture], ImageError)]
    if len(shown) < len(made.pictures):
        return None
    begin, end = answer_of(made.labels)
    asked = torch.tensor([made.input_ids[:begin]])
    said = model.generate(
        input_ids=asked,
        attention_mask=torch.ones_like(asked),
        mm_token_type_ids=asked.eq(encoder.image_token).long(),
        pixel_values=torch.cat([one.pixel_values for one in shown]),
        image_grid_thw=torch.tensor([one.grid_thw for one in shown]),
        max_new_tokens=short,
        do_sample=False,
        eos_token_id=encoder.end_token,
    )
    image = load_image(made.pictures[-1].reference, made.pictures[-1].folder).convert("RGB")
    image.thumbnail((_SIDE, _SIDE))
    answer = _text(rows, made.labels[begin:end])
    words = _text(rows, said[0, asked.shape[1] :].tolist())
    return Example(np.asarray(image), record.question, words, answer, record.kind or "")


def _short(rows: RecordRows, place: int, short: int) -> bool:
    begin, end = answer_of(rows.made[place].labels)
    return 0 < end - begin <= short and begin > 0


def _text(rows: RecordRows, tokens: list[int]) -> str:
    end = rows.encoder.end_token
    return str(rows.encoder.tokenizer.decode(tokens[: tokens.index(end)] if end in tokens else tokens)).strip()

"""Questions asked of a model, greedily: of our own on the engine, all at once; of transformers' class one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from m4ov.data import ChatEncoder, ImageError, Record
from m4ov.data.pixels import patches_of
from m4ov.data.records import assistant, image, text, user
from m4ov.evaluate.answers import answer_of
from m4ov.evaluate.benchmarks.base import Question
from m4ov.generate import Engine, SamplingOptions
from m4ov.generate.options import RequestError
from m4ov_kernels.packing import Sample

_WINDOW = 2**31  # tokens; what is too long for a model, its engine says
_AHEAD = 4  # prompts that are made before there is room for them


@dataclass(frozen=True)
class Asking:
    """A question as it is asked. ``blind``: without its images."""

    question: Question
    blind: bool = False

    @property
    def key(self) -> tuple[str, bool]:
        return self.question.id, self.blind


@dataclass(frozen=True)
class Said:
    """What came. ``finish``: as the engine has it; ``"refused"``: it could not be asked, and ``problem`` says why."""

    answer: str
    finish: str
    tokens: int
    problem: str = ""


def prompt_of(asking: Asking, encoder: ChatEncoder, dtype: torch.dtype) -> Sample:
    """Images, then the text, as a user's turn, up to where the answer begins.

    Args:
        dtype: of ``pixel_values``.

    Raises:
        RecordError: an image has no readable header; names the question.
        ImageError: an image cannot be decoded; names the question.
    """
    question = asking.question
    shown = () if asking.blind else question.images
    turns = [user(*map(image, shown), text(question.text)), assistant(".")]
    made = encoder(Record(question.id, turns), question.folder, max_length=_WINDOW)
    begin, _ = answer_of(made.labels)
    patches = patches_of(made.pictures, encoder.pixels, dtype)
    images = []
    for picture in made.pictures:
        found = patches[picture]
        if isinstance(found, ImageError):
            raise ImageError(f"question {question.id}: {found}")
        images.append(found)
    return Sample(torch.tensor(made.input_ids[:begin]), images=images)


def by_engine(
    engine: Engine, askings: Iterable[Asking], prompt: Callable[[Asking], Sample], max_tokens: int
) -> Iterator[tuple[Asking, Said]]:
    """Answers as they come. In shared numerics none depends on the others; what is too long is not asked.

    Args:
        engine: with a tokenizer.
    """
    options = SamplingOptions(max_tokens=max_tokens, temperature=0)
    waiting, more = iter(askings), True
    pending: dict[int, Asking] = {}
    try:
        while more or pending:
            while more and engine.waiting < _AHEAD:
                asking = next(waiting, None)
                if asking is None:
                    more = False
                    break
                made = prompt(asking)
                try:
                    pending[engine.submit(made, options)] = asking
                except RequestError as error:
                    yield asking, Said("", "refused", 0, str(error))
            engine.step()
            for number, completions in engine.poll().items():
                done = completions[0]
                yield pending.pop(number), Said(done.text or "", done.finish_reason, len(done.tokens))
    finally:
        for number in pending:
            engine.abort(number)
        engine.poll()


@torch.no_grad()
def by_transformers(
    model: Any, askings: Iterable[Asking], prompt: Callable[[Asking], Sample], max_tokens: int, encoder: ChatEncoder
) -> Iterator[tuple[Asking, Said]]:
    """Answers of transformers' class of a Qwen3-VL, whose linears may be quantised."""
    model.eval()
    window = model.config.get_text_config().max_position_embeddings
    for asking in askings:
        made = prompt(asking)
        ids = made.input_ids[None]
        room = window - ids.shape[1]
        if room < 1:
            problem = f"prompt: expected fewer tokens than the window's {window}, got {ids.shape[1]}"
            yield asking, Said("", "refused", 0, problem)
            continue
        vision = {}
        if made.images:
            vision["pixel_values"] = torch.cat([one.pixel_values for one in made.images])
            vision["image_grid_thw"] = torch.tensor([one.grid_thw for one in made.images])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=ids.eq(encoder.image_token).long(),
            max_new_tokens=min(max_tokens, room),
            do_sample=False,
            eos_token_id=encoder.end_token,
            **vision,
        )
        tokens = out[0, ids.shape[1] :].tolist()
        ended = bool(tokens) and tokens[-1] == encoder.end_token
        words = encoder.tokenizer.decode(tokens[:-1] if ended else tokens)
        cut = "length" if max_tokens <= room else "window"
        yield asking, Said(words, "stop" if ended else cut, len(tokens))

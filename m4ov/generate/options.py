"""What is asked of the engine and what it gives: options of a request, and completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

#: Why a completion ended. ``stop``: by an end or stop token, which is its last; ``stop_string``: by a string;
#: ``length``: after ``max_tokens``; ``window``: at the last position of the model; ``nan``: the logits of the next
#: token were not finite, and none was drawn; ``aborted``: :meth:`m4ov.generate.Engine.abort` was called.
FINISH_REASONS = ("stop", "stop_string", "length", "window", "nan", "aborted")


class RequestError(ValueError):
    """A request that cannot be served; the message names the argument, what was expected and what came."""


def _require(ok: bool, name: str, expected: str, value: object) -> None:
    if not ok:
        raise RequestError(f"{name}: expected {expected}, got {value!r}")


@dataclass(frozen=True)
class SamplingOptions:
    """How the completions of a prompt are drawn.

    Attributes:
        max_tokens: of a completion, its end token included; at least 1.
        temperature: 0: the likeliest token (of equals the first), always; else logits are divided by it.
        top_p: the smallest set of the likeliest tokens with at least this probability, in (0, 1]; 1: all.
        top_k: only so many of the likeliest tokens (and those equal to the last of them); 0: all. Before ``top_p``.
        stop: strings that end a completion; needs an engine with a tokenizer.
        stop_token_ids: tokens that end a completion, beside the engine's end tokens.
        seed: what is drawn for a sample follows from the seed, the sample's number and the place of the token, and from
            nothing else; any int of 64 bits.
        samples: completions of the prompt, which is read once for all.
        ignore_end: the engine's end tokens end nothing (``stop_token_ids`` do).

    Raises:
        RequestError: a value is out of range.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    seed: int = 0
    samples: int = 1
    ignore_end: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("top_k", 0), ("samples", 1)):
            value = getattr(self, name)
            _require(type(value) is int and value >= least, name, f"an int of at least {least}", value)
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            _require(isinstance(value, (int, float)) and not isinstance(value, bool), name, "a number", value)
        _require(0 <= self.temperature < math.inf, "temperature", "0 or a finite number above", self.temperature)
        _require(0 < self.top_p <= 1, "top_p", "a number in (0, 1]", self.top_p)
        _require(type(self.seed) is int and -(2**63) <= self.seed < 2**64, "seed", "an int of 64 bits", self.seed)
        strings = not isinstance(self.stop, str) and all(isinstance(text, str) and text for text in self.stop)
        _require(strings, "stop", "a sequence of strings, none of them empty", self.stop)
        ids = all(type(token) is int and token >= 0 for token in self.stop_token_ids)
        _require(ids, "stop_token_ids", "token ids", self.stop_token_ids)


def one_each(options: SamplingOptions | Sequence[SamplingOptions], prompts: int) -> list[SamplingOptions]:
    """Options of each prompt: those that are given, or one for all, of which prompt ``i`` takes the seed
    ``seed + i · samples``.

    Raises:
        RequestError: they are not as many as the prompts.
    """
    if isinstance(options, SamplingOptions):
        step = options.samples
        return [replace(options, seed=(options.seed + place * step) % 2**64) for place in range(prompts)]
    if len(options) != prompts:
        raise RequestError(f"options: expected one for all or {prompts}, one a prompt; got {len(options)}")
    return list(options)


@dataclass(frozen=True, eq=False)
class Completion:
    """One sample of a prompt.

    Attributes:
        tokens: int64 ``[n]``, on the CPU, the end token included; those of a stop string are there, too.
        logprobs: float32 ``[n]``: of each token, under ``softmax(logits / temperature)`` (``temperature`` 1 where
            decoding is greedy) over the whole vocabulary: before ``top_k`` and ``top_p``. What
            ``linear_logprob(hidden_states, head, tokens, temperature=temperature)`` gives a trainer.
        finish_reason: one of :data:`FINISH_REASONS`.
        weights_version: :attr:`Engine.weights_version` when it was drawn: of all its tokens.
        text: of the tokens without the end token, and cut where a stop string begins; ``None`` without a tokenizer.
    """

    tokens: Tensor
    logprobs: Tensor
    finish_reason: str
    weights_version: int
    text: str | None = None

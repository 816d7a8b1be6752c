"""``Engine``: requests join and leave between the steps, each of which draws one token of every running sample."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m4ov.generate import head, requests, sampling
from m4ov.generate.cache import Slab
from m4ov.generate.forward import Decoder, quietly
from m4ov.generate.options import Completion, RequestError, SamplingOptions, one_each
from m4ov.generate.requests import ROW, Request
from m4ov.generate.weights import Seen, check, copy_into
from m4ov.models.qwen3_vl import Qwen3VL
from m4ov_kernels.packing import Sample


class Engine:
    """Draws completions of prompts, of any number of requests at once.

    A prompt is read once however many samples are drawn of it, its images are seen once. Requests are admitted in the
    order in which they came, as soon as there is room for all tokens that their samples may draw; none is evicted. What
    a sample draws depends on the weights, its prompt and its seed alone where numerics are shared.

    Weights are the model's own parameters, where they lie: whoever trains them in this process changes what the engine
    samples from. :attr:`weights_version` counts the changes, which the engine sees by itself when no sample is running.
    A change while samples are running is refused: :meth:`update_weights` does nothing and says so, and after a change
    behind its back the next :meth:`step` raises, until the samples are begun again (:meth:`restart`), or aborted. No
    completion is drawn from two versions.

    Args:
        model: dense or with experts; on one device, not sharded.
        tokenizer: with ``decode(list of ids) → str``: for stop strings and :attr:`Completion.text`.
        end_token_ids: that end a completion; ``None``: ``eos_token_id`` of the model's configuration.
        numerics: ``"shared"``: the bits that the model's packed forward inside :func:`m4ov_kernels.invariant` and
            ``linear_logprob`` give a trainer (CPU; float32, bfloat16, float16). ``"fast"``: PyTorch's matrix products.
        weights: ``"model"``, or the text's linears packed in ``"int8"``, ``"int4"`` or ``"fp8"`` (dense models only),
            anew whenever the model's weights have changed.
        cache_bytes: of keys and values.
        max_running: samples that are drawn at once.
        prefill_tokens: of prompts that are read in one step, unless the first alone has more.
        window: positions; ``None``: ``max_position_embeddings`` of the model's configuration.

    Attributes:
        weights_version: counts changes of the weights, from 0.
        counts: of ``requests``, ``completions``, each finish reason (``finish_stop``, …), ``prefilled`` and ``decoded``
            tokens, ``steps``, ``restarted`` samples.

    Raises:
        TypeError, ValueError, RuntimeError: see :func:`m4ov.generate.weights.check`.
    """

    def __init__(
        self,
        model: Qwen3VL,
        *,
        tokenizer: Any = None,
        end_token_ids: Iterable[int] | None = None,
        numerics: str = "shared",
        weights: str = "model",
        cache_bytes: int = 2**30,
        max_running: int = 256,
        prefill_tokens: int = 8192,
        window: int | None = None,
    ) -> None:
        check(model, numerics, weights)
        for name, value in (("max_running", max_running), ("prefill_tokens", prefill_tokens)):
            if type(value) is not int or value < 1:
                raise ValueError(f"Engine: {name} must be an int of at least 1; got {value!r}")
        self.model, self.tokenizer, self.shared = model, tokenizer, numerics == "shared"
        self.max_running, self.prefill_tokens = max_running, prefill_tokens
        text = model.config.text
        self.window = text.max_position_embeddings if window is None else window
        if end_token_ids is None:
            end = text.eos_token_id
            end_token_ids = () if end is None else (end,) if isinstance(end, int) else end
        self.end_token_ids = frozenset(end_token_ids)
        parameter = model.model.language_model.embed_tokens.weight
        tokens = cache_bytes // Slab.bytes_per_token(text, parameter.dtype)
        if tokens < 1:
            raise ValueError(f"Engine: cache_bytes must be those of at least one token; got {cache_bytes}")
        self._slab = Slab(text, tokens, parameter.dtype, parameter.device)
        self._weights = weights
        self._seen = Seen(model)
        self._decoder = Decoder(model, self._slab, shared=self.shared, weights=weights)
        self.weights_version = 0
        self.counts: Counter[str] = Counter()
        self._waiting: deque[Request] = deque()
        self._rows = np.zeros(0, dtype=ROW)
        self._log = requests.Log()
        self._owners: dict[int, tuple[Request, int]] = {}  # by slot: the request, and which of its samples
        self._ends = np.zeros(text.vocab_size, dtype=bool)  # tokens that end a running sample
        self._finished: dict[int, Request] = {}
        self._next = 0

    # What a user calls.

    def generate(
        self, prompts: Sequence[Sample], options: SamplingOptions | Sequence[SamplingOptions]
    ) -> list[list[Completion]]:
        """The completions of each prompt, in order; other requests go on meanwhile.

        Args:
            prompts: token ids with their images; labels are not looked at.
            options: one for each prompt, or one for all, of which prompt ``i`` takes the seed ``seed + i · samples``.

        Raises:
            RequestError: a prompt or its options cannot be served; names it. None was begun.
        """
        found = [
            self._checked(f"prompts[{place}]", prompt, option)
            for place, (prompt, option) in enumerate(zip(prompts, one_each(options, len(prompts)), strict=True))
        ]
        numbers = [self._enqueue(request) for request in found]
        try:
            while not all(number in self._finished for number in numbers):
                self.step()
        except BaseException:
            for number in numbers:
                self.abort(number)
                self._finished.pop(number, None)
            raise
        return [_completions(self._finished.pop(number)) for number in numbers]

    def submit(self, prompt: Sample, options: SamplingOptions) -> int:
        """A request's number; it waits for the next :meth:`step`.

        Raises:
            RequestError: it cannot be served: see :func:`m4ov.generate.requests.checked`; its samples are more than
                ``max_running``, or need more room than the cache has; stop strings without a tokenizer.
        """
        return self._enqueue(self._checked("prompt", prompt, options))

    def poll(self) -> dict[int, list[Completion]]:
        """What has been finished since the last call, by the requests' numbers: all samples of a request together."""
        found, self._finished = self._finished, {}
        return {number: _completions(request) for number, request in found.items()}

    @property
    def running(self) -> int:
        """Samples that are being drawn."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Samples that are not begun."""
        return sum(len(request.waiting) for request in self._waiting)

    def step(self) -> int:
        """Read the prompts for which there is room and draw their first tokens; draw the next token of all others.
        Returns the number of tokens drawn; 0: nothing is waiting or running.

        Raises:
            RuntimeError: the weights have changed while samples are running; nothing was done.
        """
        self._look_at_weights()
        with quietly(self.shared):
            decoded = self._decode() if len(self._rows) else 0
            admitted = self._admit()
            first = self._prefill(admitted) if admitted else 0
        self.counts["steps"] += 1
        return decoded + first

    def abort(self, number: int) -> None:
        """End a request that is waiting or running: its samples are finished as they are, with reason ``aborted``.
        Nothing happens where there is none of this number."""
        rows = [self._owners[slot][0].number == number for slot in self._rows["slot"].tolist()]
        self._finish(np.array(rows, dtype=bool), ["aborted"] * sum(rows))
        for request in [request for request in self._waiting if request.number == number]:
            self._waiting.remove(request)
            for sample in request.waiting:
                self._complete(request, sample, torch.zeros(0, dtype=torch.int64), torch.zeros(0), "aborted")
            request.waiting.clear()

    def restart(self) -> int:
        """Begin the running samples again, with the weights as they are now, before all that wait; what they have drawn
        is forgotten. They draw by the same seeds. Returns how many."""
        again: dict[int, Request] = {}
        count = len(self._rows)
        for row in self._rows:
            request, sample = self._owners.pop(int(row["slot"]))
            self._log.give_back(int(row["slot"]), 0)
            self._leave(request, int(row["offset"]))
            request.waiting.append(sample)
            again[request.number] = request
        for request in self._waiting:
            again.pop(request.number, None)
        for request in sorted(again.values(), key=lambda request: -request.number):
            request.waiting.sort()
            self._waiting.appendleft(request)
        self._rows = self._rows[:0]
        self._remember_ends()
        self.counts["restarted"] += count
        return count

    def update_weights(self, source: Mapping[str, Tensor] | None = None, *, running: str = "refuse") -> int:
        """New weights, for all samples that are begun from now on. Returns :attr:`weights_version`.

        Args:
            source: tensors by the names of the model's parameters, copied into them (and converted); ``None``: the
                parameters have been changed where they lie.
            running: what happens where samples are running: ``"refuse"``: an error, before anything is changed;
                ``"restart"``: see :meth:`restart`.

        Raises:
            ValueError: names or shapes do not fit; nothing was changed.
            RuntimeError: samples are running.
        """
        if running not in ("refuse", "restart"):
            raise ValueError(f"update_weights: running must be 'refuse' or 'restart'; got {running!r}")
        if len(self._rows) and running == "refuse":
            raise RuntimeError(
                f"update_weights: {len(self._rows)} samples are running, and a completion has one version of the "
                "weights; finish or abort them, or give running='restart'"
            )
        if source is not None:
            copy_into(self.model, source)
        self.restart()
        self._renew()
        return self.weights_version

    # What it does.

    def _checked(self, where: str, prompt: Sample, options: SamplingOptions) -> Request:
        if not isinstance(options, SamplingOptions):
            raise RequestError(f"{where}: options: expected SamplingOptions, got {type(options).__name__}")
        if options.stop and self.tokenizer is None:
            raise RequestError(f"{where}: stop: expected none, as the engine has no tokenizer; got {options.stop!r}")
        if options.samples > self.max_running:
            raise RequestError(f"{where}: samples: expected at most {self.max_running}, got {options.samples}")
        request = requests.checked(where, prompt, options, self.model.config, self.window, self.end_token_ids)
        needed = sum(request.needed())
        if needed > self._slab.tokens:
            raise RequestError(
                f"{where}: expected prompt and samples that need at most {self._slab.tokens} tokens of cache, got "
                f"{needed}; give the engine more cache_bytes, or fewer max_tokens or samples"
            )
        return request

    def _enqueue(self, request: Request) -> int:
        request.number = self._next
        self._next += 1
        self._waiting.append(request)
        self.counts["requests"] += 1
        return request.number

    def _look_at_weights(self) -> None:
        if self._seen.same() and (len(self._rows) or self._seen.holds(self.model)):
            return
        if len(self._rows):
            raise RuntimeError(
                f"Engine.step: the model's weights were changed while {len(self._rows)} samples are running; restart() "
                "begins these again with the new weights, abort() ends them"
            )
        self._renew()

    def _renew(self) -> None:
        check(self.model, "shared" if self.shared else "fast", self._weights)
        self._seen = Seen(self.model)
        self.weights_version += 1
        self._decoder = Decoder(self.model, self._slab, shared=self.shared, weights=self._weights)

    def _admit(self) -> list[tuple[Request, list[int]]]:
        """Requests whose samples all have room, in order, and where their runs begin."""
        admitted: list[tuple[Request, list[int]]] = []
        tokens, samples = 0, len(self._rows)
        while self._waiting:
            request = self._waiting[0]
            samples += len(request.waiting)
            tokens += request.length
            if samples > self.max_running or (admitted and tokens > self.prefill_tokens):
                break
            runs = self._slab.take(request.needed())
            if runs is None:
                break
            request.prefix, *offsets = runs
            request.running = len(offsets)
            admitted.append((self._waiting.popleft(), offsets))
        return admitted

    def _prefill(self, admitted: list[tuple[Request, list[int]]]) -> int:
        batch = requests.pack([request.prompt for request, _ in admitted], self.model.config)
        device = self._slab.keys[0].device
        target = np.concatenate([request.prefix + np.arange(request.length) for request, _ in admitted])
        owner = np.repeat(np.arange(len(admitted)), [len(offsets) for _, offsets in admitted])
        try:
            hidden = self._decoder.prefill(batch.to(device), torch.from_numpy(target).to(device))
        except BaseException:  # nothing is lost: they wait again
            for request, offsets in reversed(admitted):
                for offset in offsets:
                    self._leave(request, offset)
                self._waiting.appendleft(request)
            raise
        rows = [self._begun(*item, delta) for item, delta in zip(admitted, batch.rope_deltas.tolist(), strict=True)]
        new = slice(len(self._rows), len(self._rows) + len(owner))
        self._rows = np.concatenate([self._rows, *rows])
        self._remember_ends()
        self.counts["prefilled"] += batch.tokens
        self._note(new, *self._draw(hidden, self._rows[new], owner))
        self._rows = self._rows[np.argsort(self._rows["offset"])]
        return len(owner)

    def _begun(self, request: Request, offsets: list[int], delta: int) -> np.ndarray:
        """The rows of a request whose prompt has been read."""
        slots = self._log.take(len(offsets), request.limit)
        rows = request.rows(request.waiting, slots, offsets, delta)
        self._owners |= {slot: (request, sample) for slot, sample in zip(slots, request.waiting, strict=True)}
        request.waiting.clear()
        return rows

    def _decode(self) -> int:
        rows = self._rows
        hidden = self._decoder.decode(self._places())
        rows["length"] += 1
        count = len(rows)
        self.counts["decoded"] += count
        self._note(slice(0, count), *self._draw(hidden, rows, None))
        return count

    def _places(self) -> np.ndarray:
        """What :meth:`Decoder.decode` takes of the rows."""
        rows = self._rows
        prompt, length = rows["prompt"], rows["length"]
        position = prompt + length + rows["delta"]
        return np.stack([rows["token"], position, rows["prefix"], prompt, rows["offset"], length])

    def _draw(
        self, hidden: Tensor, rows: np.ndarray, owner: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The next token of each row, its log-probability, and whether its logits were finite. ``owner``: which of the
        hidden states is the row's; ``None``: its own."""
        tokens = np.zeros(len(rows), dtype=np.int64)
        logprobs, good = np.zeros(len(rows), dtype=np.float32), np.ones(len(rows), dtype=bool)
        temperatures = np.where(rows["temperature"] > 0, rows["temperature"], 1.0)
        whole = bool((temperatures == temperatures[0]).all())
        for temperature in temperatures[:1] if whole else np.unique(temperatures):
            places = np.arange(len(rows)) if whole else np.nonzero(temperatures == temperature)[0]
            if owner is None:
                needed, own = places, np.arange(len(places))
            else:
                needed, own = np.unique(owner[places], return_inverse=True)
            some = hidden if len(needed) == len(hidden) else hidden.index_select(0, _index(needed, hidden))
            made = head.logits(self.model.lm_head, some, float(temperature))
            finite = (np.isfinite(made.largest.cpu().numpy()) & np.isfinite(made.log_sum.cpu().numpy()))[own]
            chosen = sampling.tokens(made, own, rows if whole else rows[places], finite)
            tokens[places], good[places] = chosen, finite
            logprobs[places] = made.logprobs(_index(own, hidden), _index(chosen, hidden)).cpu().numpy()
        return tokens, logprobs, good

    def _note(self, new: slice, tokens: np.ndarray, logprobs: np.ndarray, good: np.ndarray) -> None:
        """What was drawn for some of the rows; those that are at their end leave."""
        rows = self._rows[new]
        self._log.put(rows, tokens, logprobs)
        rows["token"] = tokens
        rows["count"] += good
        may_end = self._ends[tokens] | (rows["count"] >= rows["limit"]) | ~good | rows["strings"]
        ended, reasons = np.zeros(len(self._rows), dtype=bool), []
        for place in np.nonzero(may_end)[0].tolist():
            reason = self._reason(rows[place], bool(good[place]))
            if reason is not None:
                ended[new.start + place] = True
                reasons.append(reason)
        if reasons:
            self._finish(ended, reasons)

    def _reason(self, row: Any, good: bool) -> str | None:
        request, _ = self._owners[int(row["slot"])]
        if not good:
            return "nan"
        if int(row["token"]) in request.ends:
            return "stop"
        count = int(row["count"])
        if request.options.stop:
            tokens = self._log.tokens[row["slot"], :count].tolist()
            if requests.text_until(self.tokenizer, tokens, request.options.stop)[1]:
                return "stop_string"
        if count < row["limit"]:
            return None
        return "length" if count == request.options.max_tokens else "window"

    def _finish(self, ended: np.ndarray, reasons: Sequence[str]) -> None:
        for row, reason in zip(self._rows[ended], reasons, strict=True):
            slot = int(row["slot"])
            request, sample = self._owners.pop(slot)
            self._leave(request, int(row["offset"]))
            self._complete(request, sample, *self._log.give_back(slot, int(row["count"])), reason)
        self._rows = self._rows[~ended]
        self._remember_ends()

    def _leave(self, request: Request, offset: int) -> None:
        """A sample's run is free, and with the last one its prompt's."""
        self._slab.give_back(offset, request.own)
        request.running -= 1
        if not request.running:
            self._slab.give_back(request.prefix, request.length)

    def _complete(self, request: Request, sample: int, tokens: Tensor, logprobs: Tensor, reason: str) -> None:
        text = None
        if self.tokenizer is not None:
            said = tokens[:-1] if reason == "stop" else tokens
            text, _ = requests.text_until(self.tokenizer, said.tolist(), request.options.stop)
        request.done[sample] = Completion(tokens, logprobs, reason, self.weights_version, text)
        self.counts["completions"] += 1
        self.counts[f"finish_{reason}"] += 1
        if all(completion is not None for completion in request.done):
            self._finished[request.number] = request

    def _remember_ends(self) -> None:
        self._ends[:] = False
        running = {id(request): request for request, _ in self._owners.values()}
        for request in running.values():
            self._ends[list(request.ends)] = True


def _index(places: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(places, dtype=np.int64)).to(like.device)


def _completions(request: Request) -> list[Completion]:
    return [completion for completion in request.done if completion is not None]

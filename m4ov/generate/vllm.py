"""A vLLM server behind the engine's interface: ``POST /v1/completions`` with token ids, and vLLM's weight-update API.

What a server must be started with: ``--logprobs-mode processed_logprobs`` (else log-probabilities are those of
temperature 1, whatever the request says), and, for weights, ``VLLM_SERVER_DEV_MODE=1`` and
``--weight-transfer-config``. Its arithmetic is not the trainer's: correct for it (TIS, IcePop), and look at the
certificate.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from m4ov.generate.options import Completion, RequestError, SamplingOptions, one_each
from m4ov_kernels.packing import Sample

_AGAIN = (0, 408, 429, 500, 502, 503, 504)  # after which a request is sent again


class ServerError(RuntimeError):
    """A server that does not answer, or not as it should.

    Attributes:
        status: of its answer; 0: there was none; ``None``: the answer is no such thing.
        completed: of :meth:`VllmEngine.generate`: prompt → its completions, of those that were answered.
    """

    completed: Mapping[int, list[Completion]] = {}

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class VllmEngine:
    """Draws completions by a vLLM server. Prompts are of text: their images would have to be in vLLM's own encoding.

    Args:
        url: of the server, without ``/v1``.
        model: its name there.
        end_token_ids: that end a completion, told apart from stop tokens in nothing but this.
        at_once: requests that are under way at a time; each asks for all samples of its prompt.
        timeout: seconds for an answer.
        attempts: how often a request is sent that cannot be answered now (no connection, status 408, 429, 5xx), with
            1, 2, 4, … times ``pause`` seconds between; the same seeds draw the same tokens.
        api_key: sent as a bearer token.

    Attributes:
        weights_version: counts updates, from 0.
        counts: of ``requests``, ``completions``, finish reasons, ``attempts`` that failed.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        end_token_ids: Sequence[int] = (),
        at_once: int = 64,
        timeout: float = 600.0,
        attempts: int = 4,
        pause: float = 1.0,
        api_key: str = "",
    ) -> None:
        self.url, self.model, self.end_token_ids = url.rstrip("/"), model, frozenset(end_token_ids)
        self.timeout, self.attempts, self.pause = timeout, attempts, pause
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="vllm")
        self._under_way: dict[Future[list[Completion]], int] = {}
        self._finished: dict[int, list[Completion]] = {}
        self._failed: dict[int, Exception] = {}
        self._next = 0
        self._lock = threading.Lock()
        self.weights_version = 0
        self.counts: Counter[str] = Counter()

    def generate(
        self, prompts: Sequence[Sample], options: SamplingOptions | Sequence[SamplingOptions]
    ) -> list[list[Completion]]:
        """As :meth:`m4ov.generate.Engine.generate`.

        Raises:
            RequestError: a prompt cannot be served; nothing was sent.
            ServerError: the server did not answer some; what it did answer is in the error.
        """
        chosen = one_each(options, len(prompts))
        for place, prompt in enumerate(prompts):
            _check(f"prompts[{place}]", prompt)
        numbers = {
            self.submit(prompt, option): place
            for place, (prompt, option) in enumerate(zip(prompts, chosen, strict=True))
        }
        while any(number in self._under_way.values() for number in numbers):
            self.step()
        failed = {place: self._failed.pop(number) for number, place in numbers.items() if number in self._failed}
        found = {place: self._finished.pop(number) for number, place in numbers.items() if number in self._finished}
        if failed:
            place, first = next(iter(failed.items()))
            error = ServerError(
                f"{len(failed)} of {len(prompts)} prompts are not answered, the first of them prompts[{place}]: {first}"
            )
            error.completed = found
            raise error from first
        return [found[place] for place in range(len(prompts))]

    def submit(self, prompt: Sample, options: SamplingOptions) -> int:
        """A request's number; it is sent at once."""
        _check("prompt", prompt)
        number, self._next = self._next, self._next + 1
        self._under_way[self._pool.submit(self._asked, prompt.input_ids.tolist(), options)] = number
        self.counts["requests"] += 1
        return number

    def step(self) -> int:
        """Wait until a request is finished; returns how many are now. 0: none is under way."""
        if not self._under_way:
            return 0
        done, _ = wait(self._under_way, return_when=FIRST_COMPLETED)
        for future in done:
            number = self._under_way.pop(future)
            error = future.exception()
            if isinstance(error, Exception):
                self._failed[number] = error
                continue
            self._finished[number] = made = future.result()
            self.counts["completions"] += len(made)
            self.counts.update(f"finish_{completion.finish_reason}" for completion in made)
        return len(done)

    def poll(self) -> dict[int, list[Completion]]:
        """What has been finished since the last call, by the requests' numbers.

        Raises:
            ServerError: a request failed; raised once for each, and the others stay for the next call.
        """
        if self._failed:
            number, error = self._failed.popitem()
            raise ServerError(f"request {number} is not answered: {error}") from error
        found, self._finished = self._finished, {}
        return found

    def update_weights(self, transfer: Callable[[VllmEngine], object], *, running: str = "wait") -> int:
        """New weights for what is begun from now on: vLLM's protocol around ``transfer``, which moves them and calls
        :meth:`post` with ``/update_weights``, once or more often (vLLM's trainer classes do so over NCCL or CUDA IPC).
        Whatever happens, the server goes on. Returns :attr:`weights_version`.

        Args:
            running: what happens to requests under way: ``"wait"`` for their end, or ``"abort"`` them.

        Raises:
            ServerError: the server refused a phase, or died.
        """
        if running not in ("wait", "abort"):
            raise ValueError(f"update_weights: running must be 'wait' or 'abort'; got {running!r}")
        self.post(f"/pause?mode={running}", {})
        try:
            self.post("/start_weight_update", {})
            transfer(self)
            self.post("/finish_weight_update", {"weight_version": str(self.weights_version + 1)})
            self.weights_version += 1
        finally:
            self.post("/resume", {})
        return self.weights_version

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that a path of the server answers; sent once.

        Raises:
            ServerError: no connection, an error's status, or no JSON.
        """
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), self._headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            raise ServerError(f"{self.url}{path}: status {error.code}: {said}", error.code) from error
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{self.url}{path}: no answer ({type(error).__name__}: {error})", 0) from error
        except ValueError as error:
            raise ServerError(f"{self.url}{path}: expected JSON ({error})") from error

    def close(self) -> None:
        """Waits for what is under way."""
        self._pool.shutdown()

    def _asked(self, tokens: list[int], options: SamplingOptions) -> list[Completion]:
        version = self.weights_version
        body = {
            "model": self.model,
            "prompt": tokens,
            "n": options.samples,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k or -1,
            "seed": options.seed if options.seed < 2**63 else options.seed - 2**64,
            "stop": list(options.stop),
            "stop_token_ids": sorted({*options.stop_token_ids, *(() if options.ignore_end else self.end_token_ids)}),
            "ignore_eos": options.ignore_end,
            "include_stop_str_in_output": False,
            "logprobs": 0,
            "return_token_ids": True,
        }
        for attempt in range(self.attempts):
            found = self._tried(body)
            if not isinstance(found, ServerError):
                return self._completions(found, options, version)
            if found.status not in _AGAIN or attempt == self.attempts - 1:
                raise found
            with self._lock:
                self.counts["attempts"] += 1
            time.sleep(self.pause * 2**attempt)
        raise AssertionError("unreachable")

    def _tried(self, body: Mapping[str, Any]) -> Any:
        try:
            return self.post("/v1/completions", body)
        except ServerError as error:
            return error

    def _completions(self, answer: Any, options: SamplingOptions, version: int) -> list[Completion]:
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            made = [self._completion(choice, options, version) for choice in choices]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(
                f"{self.url}: not an answer of /v1/completions ({type(error).__name__}: {error})"
            ) from error
        if len(made) != options.samples:
            raise ServerError(f"{self.url}: expected {options.samples} choices, got {len(made)}")
        return made

    def _completion(self, choice: Any, options: SamplingOptions, version: int) -> Completion:
        tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if len(tokens) != len(logprobs):
            raise ValueError(f"{len(tokens)} tokens and {len(logprobs)} log-probabilities")
        reason = choice["finish_reason"]
        if reason == "stop":
            reason = "stop_string" if isinstance(choice.get("stop_reason"), str) else "stop"
        elif reason == "length":
            reason = "length" if len(tokens) == options.max_tokens else "window"
        elif reason == "abort":
            reason = "aborted"
        else:
            raise ValueError(f"finish_reason {reason!r}")
        ids = torch.tensor(tokens, dtype=torch.int64)
        return Completion(ids, torch.tensor(logprobs, dtype=torch.float32), reason, version, choice.get("text"))


def _check(where: str, prompt: Sample) -> None:
    if not isinstance(prompt, Sample):
        raise RequestError(f"{where}: expected a m4ov_kernels.packing.Sample, got {type(prompt).__name__}")
    if not len(prompt.input_ids):
        raise RequestError(f"{where}: expected at least one token, got none")
    if prompt.images or prompt.videos:
        count = len(prompt.images) + len(prompt.videos)
        raise RequestError(f"{where}: expected a prompt of text, as vLLM encodes images itself; got {count} of them")

"""Any server that speaks OpenAI's chat completions: asked many things at once, within its limits, and never twice."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from m4ov.data.teacher import Reply, TeacherError


@dataclass
class Usage:
    """What a teacher was asked. Tokens as the server counts them; those of cached answers cost nothing again."""

    requests: int = 0
    cached: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class _GarbageError(ValueError):
    """An answer with status 200 that is no chat completion."""


class HttpTeacher:
    """A model behind a chat-completions endpoint (vLLM, SGLang, OpenAI, …), by the ``openai`` library's client.

    The library repeats what failed on the way (status 408, 409, 429 and 5xx, no connection, no answer in time) after
    the server's ``Retry-After`` (up to two minutes) or an exponential pause; this class repeats answers that are no
    chat completion, spaces all attempts, repeated ones too, evenly under ``requests_per_minute``, and remembers
    answers. A request that stays without an answer is a :class:`TeacherError` in its place; the others go on.

    Args:
        base_url: such as ``http://localhost:8000/v1``.
        model: as the server names it.
        api_key_env: the environment variable that holds the key; empty: no key.
        concurrency: requests on the way at a time.
        requests_per_minute: at most; 0: no limit.
        timeout_seconds: of one attempt's silence.
        deadline_seconds: of one request with all its attempts and pauses.
        retries: attempts after the first one.
        cache: folder of answers, shared by processes; a request that is equal in model, messages and options is
            answered from it. ``None``: none.
        prompt_price, completion_price: per million tokens, in whatever currency.

    Raises:
        ImportError: ``openai`` or what it needs is not installed.
        ValueError: an argument is out of range, or ``api_key_env`` is not set.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str = "",
        concurrency: int = 8,
        requests_per_minute: float = 0.0,
        timeout_seconds: float = 120.0,
        deadline_seconds: float = 600.0,
        retries: int = 4,
        cache: str | Path | None = None,
        prompt_price: float = 0.0,
        completion_price: float = 0.0,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"teacher base_url: expected http://… or https://…, got {base_url!r}")
        if not model:
            raise ValueError("teacher model: expected the name of a model, got an empty string")
        if concurrency < 1 or retries < 0:
            raise ValueError(f"teacher: expected concurrency >= 1 and retries >= 0, got {concurrency} and {retries}")
        if requests_per_minute < 0 or timeout_seconds <= 0 or deadline_seconds <= 0:
            raise ValueError(
                "teacher: expected requests_per_minute >= 0, timeout_seconds > 0 and deadline_seconds > 0, got "
                f"{requests_per_minute}, {timeout_seconds} and {deadline_seconds}"
            )
        key = os.environ.get(api_key_env, "") if api_key_env else "none"
        if not key:
            raise ValueError(f"teacher api_key_env: the environment variable {api_key_env} is not set")
        try:
            import aiolimiter
            import openai
        except ImportError as error:
            raise ImportError(f"a teacher over HTTP needs {error.name}: pip install 'm4ov[data]'") from error
        self.name, self.usage = model, Usage()
        self.concurrency, self.retries, self.deadline_seconds = concurrency, retries, deadline_seconds
        self.prompt_price, self.completion_price = prompt_price, completion_price
        self._loop = asyncio.new_event_loop()
        # One attempt every so many seconds: a bucket of a minute's worth would let a burst of twice the limit through.
        self._limiter = aiolimiter.AsyncLimiter(1, 60 / requests_per_minute) if requests_per_minute else None
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=key,
            max_retries=retries,
            timeout=timeout_seconds,
            http_client=openai.DefaultAsyncHttpxClient(
                timeout=timeout_seconds, event_hooks={"request": [self._before_attempt]}
            ),
        )
        self._cache = _open_cache(cache) if cache is not None else None

    def ask_many(
        self,
        requests: Sequence[list[dict[str, Any]]],
        *,
        max_tokens: int = 1024,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Reply | TeacherError]:
        """See :class:`m4ov.data.teacher.Teacher`. Requests that are equal are asked once.

        Raises:
            OSError: the cache cannot be written.
        """
        options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        keys = [_key(self.name, messages, options) for messages in requests]
        found: dict[str, Reply | TeacherError] = {}
        new: dict[str, list[dict[str, Any]]] = {}
        for key, messages in zip(keys, requests, strict=True):
            if key in found or key in new:
                continue
            known = self._cache.get(key) if self._cache is not None else None
            if known is None:
                new[key] = messages
            else:
                text, prompt_tokens, completion_tokens = known
                found[key] = Reply(text, prompt_tokens, completion_tokens, cached=True)
        self.usage.requests += len(keys)
        self.usage.cached += len(keys) - len(new)
        if new:
            self._run(self._ask_all(iter(new.items()), options, found))
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        return [found[key] if first[key] == place else _again(found[key]) for place, key in enumerate(keys)]

    def close(self) -> None:
        """Close connections and the cache."""
        if not self._loop.is_closed():
            self._loop.run_until_complete(self._client.close())
            self._loop.close()
        if self._cache is not None:
            self._cache.close()

    def __enter__(self) -> HttpTeacher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, work: Any) -> None:
        task = self._loop.create_task(work)
        try:
            self._loop.run_until_complete(task)
        except BaseException:  # Ctrl-C, a full disk: leave nothing on the way
            pending = asyncio.all_tasks(self._loop)
            for one in pending:
                one.cancel()
            self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
            raise

    async def _ask_all(
        self,
        waiting: Iterator[tuple[str, list[dict[str, Any]]]],
        options: dict[str, Any],
        found: dict[str, Reply | TeacherError],
    ) -> None:
        async def work() -> None:
            for key, messages in waiting:
                found[key] = await self._ask(key, messages, options)

        await asyncio.gather(*(work() for _ in range(self.concurrency)))

    async def _ask(self, key: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> Reply | TeacherError:
        import openai

        try:
            reply = await asyncio.wait_for(self._attempts(messages, options), self.deadline_seconds)
        except asyncio.TimeoutError:
            problem = f"no answer within {self.deadline_seconds:g} s"
        except openai.APIStatusError as error:
            problem = f"status {error.status_code}: {_short(error.message)}"
        except (openai.OpenAIError, _GarbageError) as error:
            problem = _short(str(error))
        else:
            self.usage.prompt_tokens += reply.prompt_tokens
            self.usage.completion_tokens += reply.completion_tokens
            self.usage.cost += (
                reply.prompt_tokens * self.prompt_price + reply.completion_tokens * self.completion_price
            ) / 1e6
            self._remember(key, reply)
            return reply
        self.usage.failed += 1
        return TeacherError(f"{self.name}: {problem}")

    async def _attempts(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> Reply:
        problem = _GarbageError("no attempt")
        for _ in range(self.retries + 1):
            reply = await self._attempt(messages, options)
            if isinstance(reply, Reply):
                return reply
            problem = reply
        raise problem

    async def _attempt(self, messages: Any, options: dict[str, Any]) -> Reply | _GarbageError:
        try:
            return _reply(await self._client.chat.completions.create(model=self.name, messages=messages, **options))
        except _GarbageError as error:
            return error
        except ValueError as error:  # a body that is no JSON, or no UTF-8
            return _GarbageError(f"expected a chat completion, got no JSON ({error})")

    async def _before_attempt(self, request: Any) -> None:
        if self._limiter is not None:
            await self._limiter.acquire()

    def _remember(self, key: str, reply: Reply) -> None:
        if self._cache is None:
            return
        try:
            self._cache.set(key, (reply.text, reply.prompt_tokens, reply.completion_tokens))
        except Exception as error:  # SQLite's and the disk's
            raise OSError(f"teacher cache {self._cache.directory}: cannot be written ({error})") from error


def _again(answer: Reply | TeacherError) -> Reply | TeacherError:
    """The answer to a request that was equal to an earlier one."""
    return replace(answer, cached=True) if isinstance(answer, Reply) else answer


def _open_cache(folder: str | Path) -> Any:
    try:
        import diskcache
    except ImportError as error:
        raise ImportError("a teacher's cache needs diskcache: pip install 'm4ov[data]'") from error
    try:
        # Nothing is thrown out: an answer that was paid for is kept.
        return diskcache.Cache(str(folder), eviction_policy="none", size_limit=2**50)
    except Exception as error:
        raise OSError(f"teacher cache {folder}: cannot be opened ({error})") from error


def _key(model: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
    content = json.dumps([model, messages, options], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def _reply(completion: Any) -> Reply:
    """The library does not validate what a server sends; this does, as far as it is used."""
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise _GarbageError(f"expected a chat completion, got {_short(str(completion))}")
    text = getattr(getattr(choices[0], "message", None), "content", None)
    if not isinstance(text, str) or not text.strip():
        raise _GarbageError(f"an answer without text (finish_reason {getattr(choices[0], 'finish_reason', None)!r})")
    usage = getattr(completion, "usage", None)
    counts = [getattr(usage, name, 0) for name in ("prompt_tokens", "completion_tokens")]
    prompt, answer = (count if isinstance(count, int) and count > 0 else 0 for count in counts)
    return Reply(text, prompt, answer)


def _short(text: str, size: int = 160) -> str:
    text = " ".join(text.split()) or "no message"
    return text if len(text) <= size else text[:size] + "…"

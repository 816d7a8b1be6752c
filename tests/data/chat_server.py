"""A real HTTP server that speaks chat completions, and misbehaves on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Seen(NamedTuple):
    """A request as it came. ``text``: of the last message's last block; ``headers``: by lower-case names."""

    at: float
    text: str
    body: dict[str, Any]
    headers: dict[str, str]


class Fault:
    """Something other than an answer; called with the handler."""

    def __init__(self, act: Callable[[BaseHTTPRequestHandler], None]) -> None:
        self.act = act


def completion(text: Any, prompt_tokens: int = 7, completion_tokens: int = 3) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": 10}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices, "usage": usage}


def send(
    handler: BaseHTTPRequestHandler, status: int, body: bytes, kind: str = "application/json", **headers: str
) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(body)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def status(code: int, **headers: str) -> Fault:
    return Fault(
        lambda handler: send(handler, code, json.dumps({"error": {"message": f"no {code}"}}).encode(), **headers)
    )


def body(data: bytes, kind: str = "application/json") -> Fault:
    return Fault(lambda handler: send(handler, 200, data, kind))


def hang(seconds: float) -> Fault:
    return Fault(lambda handler: time.sleep(seconds))


def hang_up() -> Fault:
    """Close the connection without a word."""
    return Fault(lambda handler: handler.connection.close())


def drip(seconds: float) -> Fault:
    """A byte now and then: never silent for long, and never done."""

    def act(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            handler.wfile.write(b" ")
            time.sleep(0.05)

    return Fault(act)


class ChatServer:
    """Answers with what ``reply`` makes of a request: text, or a :class:`Fault`.

    Attributes:
        seen: all requests, in the order in which they came.
        most_at_once: requests that were being answered at a time.
    """

    def __init__(self, reply: Callable[[Seen], str | Fault]) -> None:
        self.reply = reply
        self.seen: list[Seen] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer._answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: Any) -> None:  # clients that went away
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        sent = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        content = sent["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        seen = Seen(time.monotonic(), text, sent, {name.lower(): value for name, value in handler.headers.items()})
        with self._lock:
            self.seen.append(seen)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            answer = self.reply(seen)
        finally:
            with self._lock:
                self._now -= 1
        try:
            if isinstance(answer, Fault):
                handler.close_connection = True
                answer.act(handler)
            else:
                send(handler, 200, json.dumps(completion(answer)).encode())
        except OSError:  # the client has gone
            handler.close_connection = True

    def __enter__(self) -> ChatServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Script:
    """What to do with each text: the given acts one after the other, and the last one for ever."""

    def __init__(self, **acts: list[str | Fault]) -> None:
        self.acts = acts
        self._calls: dict[str, int] = {}
        self._lock = threading.Lock()

    def __call__(self, seen: Seen) -> str | Fault:
        acts = self.acts.get(seen.text, [f"re: {seen.text}"])
        with self._lock:
            call = self._calls[seen.text] = self._calls.get(seen.text, -1) + 1
        return acts[min(call, len(acts) - 1)]

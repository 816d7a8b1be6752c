"""The protocol of vLLM's server, spoken to a real HTTP server that speaks it too, and misbehaves."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from m4ov.generate import RequestError, SamplingOptions
from m4ov.generate.vllm import ServerError, VllmEngine
from m4ov_kernels.packing import Patches, Sample
from tests.generate.asked import words


class Server:
    """Says the prompt's tokens plus 1, ``max_tokens`` of them at most, or what ``reply`` makes of a request."""

    def __init__(self, reply=None):
        self.reply, self.seen, self.lock = reply, [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.seen)
                    outer.seen.append((self.path, body, dict(self.headers)))
                status, answer = outer.answer(number, self.path, body)
                if status is None:  # as a server that dies
                    self.connection.close()
                    self.close_connection = True
                    return
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, number, path, body):
        found = self.reply(number, path, body) if self.reply else None
        if found is not None:
            return found
        return (200, completions(body)) if path == "/v1/completions" else (200, {"message": "done"})

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    @property
    def paths(self):
        return [path for path, _, _ in self.seen]


def completions(body, reason="length", **more):
    choices = []
    for index in reversed(range(body["n"])):
        tokens = [token + 1 + index for token in body["prompt"][: body["max_tokens"]]]
        logprobs = {"token_logprobs": [-0.5 - index] * len(tokens), "tokens": ["x"] * len(tokens)}
        choices.append(
            {"index": index, "token_ids": tokens, "logprobs": logprobs, "finish_reason": reason, "text": "said", **more}
        )
    return {"choices": choices}


def engine(server, **options):
    return VllmEngine(server.url + "/", model="m", pause=0.01, **options)


def test_prompts_and_options_are_sent_as_vllm_reads_them():
    with Server() as server:
        asked = words(5, 7, 3)
        options = SamplingOptions(
            max_tokens=5, temperature=0.7, top_p=0.9, samples=2, seed=2**64 - 2, stop=["."], stop_token_ids=[4]
        )
        made = engine(server, end_token_ids=[9], api_key="key").generate(asked, options)
    assert [[len(one.tokens) for one in some] for some in made] == [[5, 5], [5, 5], [3, 3]]
    for prompt, some in zip(asked, made, strict=True):
        for index, one in enumerate(some):
            assert one.tokens.tolist() == [token + 1 + index for token in prompt.input_ids.tolist()[:5]]
            assert one.logprobs.tolist() == [-0.5 - index] * len(one.tokens)
    assert [some[0].finish_reason for some in made] == ["length", "length", "window"]
    by_prompt = {tuple(body["prompt"]): body for _, body, _ in server.seen}
    bodies = [by_prompt[tuple(prompt.input_ids.tolist())] for prompt in asked]
    assert [body.pop("seed") for body in bodies] == [-2, 0, 2]
    assert [body.pop("prompt") for body in bodies] == [prompt.input_ids.tolist() for prompt in asked]
    assert bodies[0] == bodies[1] == bodies[2]
    assert bodies[0] == {
        "model": "m",
        "n": 2,
        "max_tokens": 5,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": -1,
        "stop": ["."],
        "stop_token_ids": [4, 9],
        "ignore_eos": False,
        "include_stop_str_in_output": False,
        "logprobs": 0,
        "return_token_ids": True,
    }
    assert server.seen[0][2]["Authorization"] == "Bearer key"


@pytest.mark.parametrize(
    ("reason", "more", "expected"),
    [
        ("stop", {"stop_reason": None}, "stop"),
        ("stop", {"stop_reason": 4}, "stop"),
        ("stop", {"stop_reason": "."}, "stop_string"),
        ("abort", {}, "aborted"),
    ],
)
def test_finish_reasons(reason, more, expected):
    with Server(lambda _, path, body: (200, completions(body, reason, **more))) as server:
        made = engine(server).generate(words(3), SamplingOptions(max_tokens=8))
    assert made[0][0].finish_reason == expected
    assert made[0][0].text == "said"


def test_what_cannot_be_answered_now_is_asked_again():
    def reply(number, path, body):
        return {0: (503, {"error": "busy"}), 1: (None, None), 2: (429, {})}.get(number)

    with Server(reply) as server:
        asked = engine(server)
        made = asked.generate(words(4), SamplingOptions(max_tokens=4, seed=3))
    assert len(made[0][0].tokens) == 4
    assert len(server.seen) == 4
    assert len({json.dumps(body) for _, body, _ in server.seen}) == 1
    assert asked.counts["attempts"] == 3


BROKEN = {
    "refused": (lambda body: (400, {"error": "no such model"}), "status 400: .*no such model", 1),
    "dead": (lambda body: (None, None), "no answer", 4),
    "no JSON": (lambda body: (200, b"<html>"), "expected JSON", 1),
    "another answer": (lambda body: (200, {"error": 1}), "not an answer of /v1/completions .KeyError", 1),
    "too few": (lambda body: (200, completions({**body, "n": 1})), "expected 2 choices, got 1", 1),
    "an unknown reason": (lambda body: (200, completions(body, "bored")), "finish_reason 'bored'", 1),
    "no log-probability": (
        lambda body: (200, {"choices": [{"index": 0, "token_ids": [1], "logprobs": {"token_logprobs": []}}]}),
        "1 tokens and 0 log-probabilities",
        1,
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_server_that_fails_loses_nothing_that_it_answered(fault):
    make, message, times = BROKEN[fault]
    asked = words(4, 6, 5)
    bad = asked[1].input_ids.tolist()
    with Server(lambda _, path, body: make(body) if body["prompt"] == bad else None) as server:
        using = engine(server)
        options = SamplingOptions(max_tokens=4, samples=2)
        with pytest.raises(
            ServerError, match=rf"1 of 3 prompts are not answered, .*prompts\[1\]: .*{message}"
        ) as caught:
            using.generate(asked, options)
        assert sorted(caught.value.completed) == [0, 2]
        assert all(len(some) == 2 for some in caught.value.completed.values())
        assert sum(body["prompt"] == bad for _, body, _ in server.seen) == times
        number = using.submit(asked[1], options)
        other = using.submit(asked[0], options)
        while using.step():
            pass
        with pytest.raises(ServerError, match=f"request {number} is not answered: .*{message}"):
            using.poll()
        assert list(using.poll()) == [other]
        using.close()


def test_images_are_not_sent():
    picture = Sample(torch.tensor([3]), None, [Patches(torch.zeros(4, 6), (1, 2, 2))])
    with Server() as server:
        with pytest.raises(RequestError, match=r"prompts\[1\]: expected a prompt of text.* got 1"):
            engine(server).generate([*words(2), picture], SamplingOptions())
        with pytest.raises(RequestError, match="at least one token"):
            engine(server).submit(Sample(torch.zeros(0, dtype=torch.int64)), SamplingOptions())
    assert not server.seen


def test_weights_are_updated_in_vllms_phases():
    with Server() as server:
        using = engine(server)
        first = using.generate(words(3), SamplingOptions(max_tokens=2))
        update = {"update_info": {"names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[2]]}}
        assert using.update_weights(lambda engine: engine.post("/update_weights", update)) == 1
        second = using.generate(words(3), SamplingOptions(max_tokens=2))
    assert [made[0][0].weights_version for made in (first, second)] == [0, 1]
    assert server.paths[1:-1] == [
        "/pause?mode=wait",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/resume",
    ]
    assert server.seen[3][1] == update
    assert server.seen[4][1] == {"weight_version": "1"}


def test_an_update_that_fails_leaves_the_server_running_with_the_old_version():
    with Server(lambda _, path, body: (500, {"error": "no"}) if path == "/update_weights" else None) as server:
        using = engine(server)
        with pytest.raises(ServerError, match="/update_weights: status 500"):
            using.update_weights(lambda engine: engine.post("/update_weights", {}), running="abort")
        assert server.paths == ["/pause?mode=abort", "/start_weight_update", "/update_weights", "/resume"]
        assert using.weights_version == 0
        with pytest.raises(ValueError, match="running must be 'wait' or 'abort'; got 'keep'"):
            using.update_weights(lambda engine: None, running="keep")

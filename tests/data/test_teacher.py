"""Teachers: one over HTTP against a real server that misbehaves, and the embedded one against the truth."""

from __future__ import annotations

import json
import os
import re
import threading
import time

import numpy as np
import pytest

from m4ov.data.records import DIFFICULTIES
from m4ov.data.teacher import Reply, TeacherError
from m4ov.data.teacher.embedded import EmbeddedTeacher, capability
from m4ov.data.teacher.tasks import (
    AnswerError,
    match_request,
    questions_request,
    read_match,
    read_questions,
)
from m4ov.data.teacher.templates import CAPABILITIES, questions
from tests.data import chat_server
from tests.data.chat_server import ChatServer, Script

pytest.importorskip("openai")
from m4ov.data.teacher.http import HttpTeacher


def ask(text):
    return [{"role": "user", "content": text}]


def teacher(server, **options):
    return HttpTeacher(server.url, "m", **{"timeout_seconds": 10.0, "retries": 2, **options})


# --- over HTTP -------------------------------------------------------------------------------------------------------


def test_answers_come_in_order_and_no_more_than_so_many_at_once():
    together = threading.Barrier(3)

    def reply(seen):
        together.wait(timeout=10)  # passes only if three are on the way at once
        return f"re: {seen.text}"

    with ChatServer(reply) as server, teacher(server, concurrency=3) as asked:
        replies = asked.ask_many([ask(f"q{n}") for n in range(12)])
        assert [reply.text for reply in replies] == [f"re: q{n}" for n in range(12)]
        assert server.most_at_once == 3
        assert all(not reply.cached and (reply.prompt_tokens, reply.completion_tokens) == (7, 3) for reply in replies)


def test_options_reach_the_server_and_make_other_requests(monkeypatch, tmp_path):
    monkeypatch.setenv("A_KEY", "secret")
    with ChatServer(Script()) as server, teacher(server, api_key_env="A_KEY", cache=tmp_path) as asked:
        for temperature in (0.0, 0.5, 0.0):
            asked.ask_many([ask("q")], max_tokens=33, temperature=temperature, seed=4)
        assert [seen.body["temperature"] for seen in server.seen] == [0.0, 0.5]
        assert {(seen.body["max_tokens"], seen.body["seed"], seen.body["model"]) for seen in server.seen} == {
            (33, 4, "m")
        }
        assert server.seen[0].headers["authorization"] == "Bearer secret"


def test_a_rate_limit_is_waited_for_as_long_as_the_server_says():
    script = Script(q=[chat_server.status(429, Retry_After="1"), "good"])
    with ChatServer(script) as server, teacher(server) as asked:
        assert asked.ask_many([ask("q")])[0].text == "good"
        first, second = server.seen
        assert second.at - first.at >= 0.99  # the library's own pause is at most half a second


def test_a_limit_of_its_own_spaces_all_attempts():
    script = Script(q1=[chat_server.body(b"?", "text/plain"), "good"])
    with ChatServer(script) as server, teacher(server, requests_per_minute=1200) as asked:
        began = time.monotonic()
        asked.ask_many([ask(f"q{n}") for n in range(4)])
        asked.ask_many([ask(f"r{n}") for n in range(4)])
        assert len(server.seen) == 9
        assert time.monotonic() - began >= 8 * 0.05 * 0.98


FAULTS = {
    "500": chat_server.status(500),
    "html": chat_server.body(b"<html>busy</html>", "text/html"),
    "cut": chat_server.body(b'{"choices": [{"mess'),
    "no_choices": chat_server.body(b'{"error": "none"}'),
    "empty": chat_server.body(json.dumps({"choices": []}).encode()),
    "list": chat_server.body(b"[1, 2]"),
    "null": chat_server.body(json.dumps(chat_server.completion(None)).encode()),
    "blank": chat_server.body(json.dumps(chat_server.completion("  ")).encode()),
    "no_utf8": chat_server.body(b'{"choices": "\xff\xfe"}'),
    "hang_up": chat_server.hang_up(),
    "hang": chat_server.hang(1.0),
}


def test_what_goes_wrong_once_is_asked_again():
    script = Script(**{name: [fault, f"good {name}"] for name, fault in FAULTS.items()})
    with ChatServer(script) as server, teacher(server, concurrency=len(FAULTS), timeout_seconds=0.7) as asked:
        replies = asked.ask_many([ask(name) for name in FAULTS])
        assert [getattr(reply, "text", reply) for reply in replies] == [f"good {name}" for name in FAULTS]
        assert len(server.seen) == 2 * len(FAULTS)


def test_what_stays_wrong_is_an_error_in_its_place_and_is_not_remembered(tmp_path):
    script = Script(**{name: [fault] for name, fault in FAULTS.items()}, bad=[chat_server.status(400)])
    names = [*FAULTS, "bad"]
    with ChatServer(script) as server:
        options = {"concurrency": len(names), "timeout_seconds": 0.4, "retries": 0, "cache": tmp_path}
        with teacher(server, **options) as asked:
            replies = asked.ask_many([ask(name) for name in [*names, "good"]])
            assert all(isinstance(reply, TeacherError) for reply in replies[:-1])
            assert replies[-1].text == "re: good"
            says = dict(zip(names, map(str, replies), strict=False))
            assert "status 500: " in says["500"]
            assert "no 500" in says["500"]
            assert "<html>busy</html>" in says["html"]
            assert "timed out" in says["hang"]
            assert "Connection error" in says["hang_up"]
            assert "without text" in says["null"]
            assert asked.usage.failed == len(names)
        script.acts = {}
        with teacher(server, **options) as asked:
            replies = asked.ask_many([ask(name) for name in [*names, "good"]])
            assert [reply.cached for reply in replies] == [False] * len(names) + [True]


def test_a_refusal_is_not_asked_again():
    with ChatServer(Script(q=[chat_server.status(400)])) as server, teacher(server) as asked:
        [error] = asked.ask_many([ask("q")])
        assert isinstance(error, TeacherError)
        assert "status 400" in str(error)
        assert len(server.seen) == 1


def test_a_server_that_drips_meets_the_deadline():
    with ChatServer(Script(q=[chat_server.drip(5)])) as server, teacher(server, deadline_seconds=0.4) as asked:
        began = time.monotonic()
        error, good = asked.ask_many([ask("q"), ask("r")])
        assert "no answer within 0.4 s" in str(error)
        assert good.text == "re: r"
        assert time.monotonic() - began < 4


def test_nobody_listens():
    with ChatServer(Script()) as server:
        url = server.url
    with HttpTeacher(url, "m", retries=0) as asked:
        [error] = asked.ask_many([ask("q")])
        assert "Connection error" in str(error)


def test_answers_are_remembered_and_cost_once(tmp_path):
    options = {"cache": tmp_path, "prompt_price": 2.0, "completion_price": 10.0}
    with ChatServer(Script()) as server:
        with teacher(server, **options) as asked:
            first = asked.ask_many([ask("a"), ask("b"), ask("a")])
            assert len(server.seen) == 2  # equal requests are one
            assert [reply.cached for reply in first] == [False, False, True]
            assert asked.usage.cost == pytest.approx(2 * (7 * 2 + 3 * 10) / 1e6)
        with teacher(server, **options) as asked:
            again = asked.ask_many([ask("a"), ask("b"), ask("c")])
            assert [reply.cached for reply in again] == [True, True, False]
            assert again[0] == Reply(first[0].text, 7, 3, cached=True)
            assert asked.usage.cost == pytest.approx((7 * 2 + 3 * 10) / 1e6)
        assert len(server.seen) == 3


def test_bad_arguments_are_named(monkeypatch, tmp_path):
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ValueError, match="environment variable NOT_SET is not set"):
        HttpTeacher("http://localhost", "m", api_key_env="NOT_SET")
    with pytest.raises(ValueError, match="base_url: expected http"):
        HttpTeacher("localhost:8000", "m")
    with pytest.raises(ValueError, match="concurrency >= 1"):
        HttpTeacher("http://localhost", "m", concurrency=0)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match="cannot be opened"):
        HttpTeacher("http://localhost", "m", cache=file)


# --- from the truth --------------------------------------------------------------------------------------------------

VOCABULARY = {
    "colour": {colour: [f"{colour} shape", f"{colour} shapes"] for colour in ("red", "blue", "teal", "gray")},
    "shape": {shape: [shape, f"{shape}s"] for shape in ("circle", "triangle", "rectangle")},
}


def scene(random):
    """A random truth of one to four shapes in the corners of an image."""
    corners = [(0, 0), (64, 0), (0, 64), (64, 64)]
    objects = []
    for place in random.permutation(4)[: random.integers(1, 5)]:
        x, y = corners[place]
        x0, y0 = x + int(random.integers(0, 30)), y + int(random.integers(0, 30))
        attributes = {name: str(random.choice(list(values))) for name, values in VOCABULARY.items()}
        box = [x0, y0, x0 + int(random.integers(4, 34)), y0 + int(random.integers(4, 34))]
        objects.append({"label": f"{attributes['colour']} {attributes['shape']}", "box": box, "attributes": attributes})
    truth = {"size": [128, 128], "thing": "shape", "objects": objects, "complete": True, "vocabulary": VOCABULARY}
    return truth


def true_answer(question, objects):
    """The answer, worked out anew from the objects; ``None``: this is no question that is known here."""
    text = question.rstrip("?.").lower()

    def which(noun):
        words = set(noun.split()) - {"a", "an", "the"}
        words = {word.removesuffix("s") for word in words} - {"shape"}
        return [one for one in objects if words <= set(one["label"].split())]

    def yes(value):
        return "yes" if value else "no"

    def at(corner):
        vertical, horizontal = corner.split()
        return next(
            one
            for one in objects
            if (one["box"][1] < 64) == (vertical == "top") and (one["box"][0] < 64) == (horizontal == "left")
        )

    rules = [
        (r"(?:how many (.+?) (?:are there|can be seen))$", lambda m: str(len(which(m[1])))),
        (r"count the (.+?)\. how many are there$", lambda m: str(len(which(m[1])))),
        (r"is there no (.+) in the image$", lambda m: yes(not which(m[1]))),
        (r"is it true that the image has no (.+)$", lambda m: yes(not which(m[1]))),
        (r"is there (.+) in the image$", lambda m: yes(which(m[1]))),
        (r"does the image contain (.+)$", lambda m: yes(which(m[1]))),
        (r"can (.+) be seen here$", lambda m: yes(which(m[1]))),
        (r"are there more (.+) than (.+)$", lambda m: yes(len(which(m[1])) > len(which(m[2])))),
        (r"which shape is this$", lambda m: objects[0]["attributes"]["shape"]),
        (r"what colour is the shape$", lambda m: objects[0]["attributes"]["colour"]),
        (r"which shape is at the (.+)$", lambda m: at(m[1])["attributes"]["shape"]),
        (r"which colour does the shape at the (.+) have$", lambda m: at(m[1])["attributes"]["colour"]),
        (
            r"are the shapes at the (.+) and at the (.+) the same$",
            lambda m: yes(at(m[1])["attributes"]["shape"] == at(m[2])["attributes"]["shape"]),
        ),
        (
            r"do the shapes at the (.+) and at the (.+) have the same colour$",
            lambda m: yes(at(m[1])["attributes"]["colour"] == at(m[2])["attributes"]["colour"]),
        ),
        (
            r"is the (.+) in the left or the right half of the image$",
            lambda m: "left" if which(m[1])[0]["box"][2] <= 64 else "right",
        ),
        (
            r"is the (.+) in the upper or the lower half of the image$",
            lambda m: "upper" if which(m[1])[0]["box"][3] <= 64 else "lower",
        ),
        (r"is the (.+) left of the (.+)$", lambda m: yes(which(m[1])[0]["box"][2] <= which(m[2])[0]["box"][0])),
        (r"is the (.+) right of the (.+)$", lambda m: yes(which(m[1])[0]["box"][0] >= which(m[2])[0]["box"][2])),
        (r"is the (.+) above the (.+)$", lambda m: yes(which(m[1])[0]["box"][3] <= which(m[2])[0]["box"][1])),
        (r"is the (.+) below the (.+)$", lambda m: yes(which(m[1])[0]["box"][1] >= which(m[2])[0]["box"][3])),
        (r"which looks larger, the (.+) or the (.+)$", lambda m: f"the {max((m[1], m[2]), key=area)}"),
    ]

    def area(label):
        x0, y0, x1, y1 = which(label)[0]["box"]
        return (x1 - x0) * (y1 - y0)

    for pattern, answer in rules:
        if match := re.fullmatch(pattern.rstrip("$"), text):
            return answer(match)
    return None


def test_every_answer_of_the_embedded_teacher_is_true():
    random = np.random.default_rng(int(os.environ["M4OV_TEST_SEED"]))
    kinds = set()
    for number in range(150):
        truth = scene(random)
        found = questions(truth, f"{number}")
        assert len({one.text.casefold() for one in found}) == len(found)
        for one in found:
            assert true_answer(one.text, truth["objects"]) == one.answer, (one, truth["objects"])
            assert one.difficulty in DIFFICULTIES
        kinds |= {one.kind for one in found}
    assert kinds >= {
        "existence",
        "negation",
        "counting",
        "comparison",
        "conjunction",
        "region",
        "same",
        "direction",
        "size",
    }


def test_numbers_and_rows_are_true():
    random = np.random.default_rng(int(os.environ["M4OV_TEST_SEED"]) + 1)
    for number in range(50):
        rows, columns = int(random.integers(1, 4)), int(random.integers(2, 4))
        shown = random.integers(0, 10, (rows, columns))
        objects = [
            {
                "label": str(value),
                "box": [
                    32 * (place % columns),
                    32 * (place // columns),
                    32 * (place % columns) + 32,
                    32 * (place // columns) + 32,
                ],
                "attributes": {"digit": str(value)},
            }
            for place, value in enumerate(shown.ravel())
        ]
        text = [" ".join(map(str, row)) for row in shown]
        digits = {"digit": {str(n): [str(n), f"{n}s"] for n in range(10)}}
        truth = {"thing": "digit", "objects": objects, "complete": True, "vocabulary": digits, "text": text}
        found = {one.text: one.answer for one in questions(truth, str(number))}
        assert found["What is the sum of all the digits?"] == str(shown.sum())
        assert found["What is the largest digit?"] == str(shown.max())
        assert found["What is the smallest digit?"] == str(shown.min())
        assert found["By how much is the largest digit larger than the smallest?"] == str(shown.max() - shown.min())
        for asked, answer in found.items():
            if match := re.fullmatch(r".*row (\d).*from left to right[.?]", asked):
                assert answer == text[int(match[1]) - 1]
            if match := re.fullmatch(r"What stands (first|last) in row (\d)\?", asked):
                assert answer == text[int(match[2]) - 1].split()[0 if match[1] == "first" else -1]
            if match := re.fullmatch(r"(?:How many|Count the) (\d)s.*", asked):
                assert answer == str((shown == int(match[1])).sum())


def test_the_embedded_teacher_gives_what_is_asked_for_and_always_the_same():
    random = np.random.default_rng(7)
    truth, able = scene(random) | {"topic": "shapes.several.apart"}, sorted(set(CAPABILITIES.values()))
    while len(truth["objects"]) < 4:
        truth["objects"] = scene(random)["objects"]
    wanted = {"easy": 3, "medium": 5, "hard": 4}
    request = questions_request(None, "x", wanted, able, truth, 0)
    one, other = EmbeddedTeacher().ask_many([request, questions_request(None, "x", wanted, able, truth, 1)])
    drafts = read_questions(one)
    assert {name: sum(draft.difficulty == name for draft in drafts) for name in DIFFICULTIES} == wanted
    assert EmbeddedTeacher().ask_many([request]) == [one]
    assert other != one
    assert len({draft.kind for draft in drafts}) >= 6  # one kind in turn
    assert all(draft.capability == capability(draft.kind) for draft in drafts)
    only = [capability("direction")]
    [few] = EmbeddedTeacher().ask_many([questions_request(None, "x", wanted, only, truth, 0)])
    assert {draft.kind for draft in read_questions(few)} == {"direction"}
    [many] = EmbeddedTeacher().ask_many([questions_request(None, "x", {"hard": 1000}, able, truth, 0)])
    everything = questions(truth, "0|x")
    assert len(read_questions(many)) == len(everything)  # what hard ones lack, others give; none comes twice


def test_the_embedded_teacher_matches_labels_by_truth_or_by_name():
    topics = ["nature.animals.pets", "things.household.clocks"]
    able = sorted(set(CAPABILITIES.values()))
    told, named, nothing = EmbeddedTeacher().ask_many(
        [
            match_request(None, topics, able, {"topic": "things.household.clocks", "label": "a clock"}),
            match_request(None, topics, able, {"label": "two clocks"}),
            match_request(None, topics, able, {"label": "a violin"}),
        ]
    )
    assert read_match(told) == ("things.household.clocks", ["perception.recognition.object"])
    assert read_match(named)[0] == "things.household.clocks"
    assert read_match(nothing)[0] == ""


@pytest.mark.parametrize(
    "truth",
    [
        {"objects": [{}]},
        {"facts": {"x": {}}},
        {"questions": [["one"]]},
        {"size": "big", "objects": [{"box": [0] * 4}] * 2},
    ],
)
def test_a_truth_that_is_malformed_is_an_error_in_its_place(truth):
    [error, good] = EmbeddedTeacher().ask_many(
        [
            questions_request(None, "x", {"easy": 1}, list(CAPABILITIES.values()), truth, 0),
            questions_request(None, "x", {"easy": 1}, list(CAPABILITIES.values()), {"label": "a cat"}, 0),
        ]
    )
    assert "the truth is malformed" in str(error)
    assert [draft.answer for draft in read_questions(good)] == ["a cat"]


def test_a_task_that_is_not_its_own_is_an_error():
    [error] = EmbeddedTeacher().ask_many([ask("What is love?")])
    assert isinstance(error, TeacherError)


def test_answers_that_are_not_what_was_asked_for_are_named():
    for text in ("Sure! Here are some", "[]", '{"questions": 3}', '{"topic": 1}'):
        with pytest.raises(AnswerError):
            read_questions(Reply(text))
        with pytest.raises(AnswerError):
            read_match(Reply(text))
    good = {"question": "What?", "answer": 3, "difficulty": "easy", "capability": "c"}
    bad = [
        {**good, "difficulty": "trivial"},
        {**good, "answer": " "},
        {**good, "answer": True},
        {"question": "What?"},
        7,
    ]
    drafts = read_questions(Reply(f"```json\n{json.dumps({'questions': [good, *bad]})}\n```"))
    assert drafts[0].answer == "3"
    assert all(isinstance(draft, AnswerError) for draft in drafts[1:])

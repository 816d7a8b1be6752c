"""Data production from files and with a teacher that are not ours: what is bad is named and left out."""

from __future__ import annotations

import dataclasses
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from m4ov.data.production import STEPS, BuildError, build
from m4ov.data.shards import read_records
from m4ov.data.teacher import Reply
from m4ov.data.teacher.embedded import EmbeddedTeacher
from m4ov.data.teacher.tasks import task_of
from m4ov.data_recipe import AllotConfig, EngineConfig, LabelsConfig, TeacherConfig
from m4ov.recipe import RunConfig
from tests.data import chat_server
from tests.data.chat_server import ChatServer
from tests.data.small_production import digest, recipe, rows, sources

# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_images_and_lines_are_named_counted_and_left_out(tmp_path):
    random = np.random.default_rng(int(os.environ["M4OV_TEST_SEED"]))
    for name in ("a", "b", "c"):
        Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    Image.fromarray(random.integers(0, 256, (40, 40), dtype=np.uint8)).save(tmp_path / "d.bmp")
    (tmp_path / "text.jpg").write_text("no image")
    cat = {"topic": "nature.animals.pets", "label": "a cat"}
    good = {"id": "good", "image": "a.png", "truth": cat}
    lines = [
        json.dumps(good),
        json.dumps({**good, "image": "b.png"}),  # the same id
        "{",
        json.dumps([1]),
        json.dumps({**good, "id": "surplus", "colour": "red"}),
        json.dumps({**good, "id": "gone", "image": "gone.png"}),
        json.dumps({**good, "id": "cut", "image": "cut.png"}),
        json.dumps({**good, "id": "text", "image": "text.jpg"}),
        json.dumps({**good, "id": "truth", "truth": 3}),
        "",
        json.dumps({**good, "id": "long", "x": "y" * (17 * 2**20)}),
        json.dumps({**good, "id": "dangling", "image": "c.png", "truth": {**cat, "topic": "nature.animal.pets"}}),
        json.dumps({**good, "id": "unknown", "image": "c.png", "truth": {"label": "a gryphon"}}),
        json.dumps({**good, "id": "odd", "image": "c.png", "truth": {**cat, "facts": 3}}),
        json.dumps({**good, "id": "half", "image": "c.png", "truth": {**cat, "questions": [["one"]]}}),
        json.dumps({**good, "id": "bmp", "image": str(tmp_path / "d.bmp"), "truth": {**cat, "label": "a pet"}}),
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines) + "\n")
    mine = sources(files=[str(tmp_path / "mine.jsonl")])
    few, engine = AllotConfig(questions=4), EngineConfig(shard_images=4)
    production = build(recipe(tmp_path / "run", sources=mine, allot=few, engine=engine))
    found = {(row["reason"], row.get("line", row["id"])) for row in rows(tmp_path / "run", "rejected.jsonl")}
    assert found == {
        ("not JSON", 3),
        ("field", 4),
        ("field", 5),
        ("image", 6),
        ("image", 7),
        ("image", 8),
        ("field", 9),
        ("line too long", 11),
        ("duplicate id", "good"),
        ("label", "dangling"),
        ("label", "unknown"),
        ("score", "odd"),
        ("no answer", "half"),
    }
    records = list(read_records(production.records))
    assert {record.meta["image_id"] for record in records} == {"good", "bmp"}
    assert sum(production.reasons.values()) == len(found)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(BuildError, match=r"sources\.files: .*none\.jsonl: no such file"):
        build(recipe(tmp_path, sources=sources(files=[str(tmp_path / "none.jsonl")])))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(BuildError, match="no image is there"):
        build(recipe(tmp_path, sources=sources(files=[str(tmp_path / "empty.jsonl")])))
    with pytest.raises(ValueError, match=r"allot\.by: expected density or uniform"):
        AllotConfig(by="chance")


# --- a teacher over HTTP ---------------------------------------------------------------------------------------------


class Oracle:
    """A teacher behind HTTP that answers from the truth, and has its faults by image."""

    def __init__(self, faults):
        self.faults = faults
        self.limited = False
        self.answers = {}  # (image, question) → answer
        self.disputed = set()  # questions that are answered otherwise when asked again
        self.guessed = {}  # question → answer without the image

    def __call__(self, seen):
        task = task_of(seen.body["messages"])
        blocks = seen.body["messages"][-1]["content"]
        shown = next((block["image_url"]["url"] for block in blocks if block["type"] == "image_url"), None)
        if task is None:  # an answer to a question, with the image or without
            question = seen.text.rpartition("\n")[2]
            if shown is None:
                return self.guessed.get(question, "I cannot tell")
            return "nonsense" if question in self.disputed else f"The {self.answers[shown, question]}."
        assert shown
        if not self.limited:
            self.limited = True
            return chat_server.status(429, Retry_After="0.2")
        [reply] = EmbeddedTeacher().ask_many([seen.body["messages"]])
        assert isinstance(reply, Reply)
        if task["task"] == "questions":
            fault = self.faults.get(task["id"])
            drafts = json.loads(reply.text)["questions"]
            self.answers |= {(shown, draft["question"]): draft["answer"] for draft in drafts}
            if fault == "dangling":
                drafts[0]["capability"] = "perception.magic"
                return json.dumps({"questions": drafts})
            if fault == "long":
                drafts[0]["answer"] = "yes " * 400
                return json.dumps({"questions": drafts})
            if fault is not None:
                return fault
        return reply.text


def test_a_teacher_over_http_is_held_to_what_was_asked(tmp_path):
    pytest.importorskip("openai")
    flags = sources(flags=8)
    ids = sorted({row["id"] for row in _images(tmp_path / "names", flags)})
    faults = ("Sure! Here are your questions.", chat_server.status(400), "dangling", "long")
    oracle = Oracle(dict(zip(ids, faults, strict=False)))
    with ChatServer(oracle) as server:
        config = recipe(
            tmp_path / "run",
            sources=flags,
            allot=AllotConfig(questions=32),
            engine=EngineConfig(shard_images=4),
            teacher=TeacherConfig("http", server.url, "m", retries=2, prompt_price=1.0, completion_price=2.0),
        )
        production = build(config)
        reasons = {
            (re.sub(r"-q\d\d$", "", row["id"]), row["reason"]) for row in rows(tmp_path / "run", "rejected.jsonl")
        }
        assert reasons >= {(ids[0], "answer"), (ids[1], "no answer"), (ids[2], "label"), (ids[3], "length")}
        counts = production.counts
        assert counts["match"]["requests"] == 8
        assert counts["questions"]["requests_failed"] == 1
        assert counts["check"]["right_with_image"] == counts["check"]["asked_again"] > 0
        assert counts["check"]["right_without_image"] == 0
        tokens = production.spent["prompt_tokens"], production.spent["completion_tokens"]
        assert production.spent["cost"] == pytest.approx((tokens[0] + 2 * tokens[1]) / 1e6)
        assert production.spent["cost"] > 0
        before, asked = digest(tmp_path / "run"), len(server.seen)
        for manifest in (tmp_path / "run").glob("steps/*/*.manifest.json"):
            manifest.unlink()
        again = build(config)
        assert digest(tmp_path / "run") == before
        assert len(server.seen) == asked + 1  # all from the cache but the one that was refused
        assert again.spent["cost"] == 0
        some, *others = read_records(again.records)
        other = next(one for one in others if one.question != some.question)
        oracle.guessed, oracle.disputed = {some.question: some.answer}, {other.question}
        build(dataclasses.replace(config, run=RunConfig(folder=str(tmp_path / "other"))))
        turned_away = [row for row in rows(tmp_path / "other", "rejected.jsonl") if "record" in row]
        why = {row["id"]: row["reason"] for row in turned_away}
        assert (why[some.id], why[other.id]) == ("blind", "disagreement")


def _images(folder, some):
    build(recipe(folder, sources=some, allot=AllotConfig(questions=8)))
    return rows(folder, "audit.jsonl")


def test_a_teacher_that_fails_too_often_stops_the_run(tmp_path):
    pytest.importorskip("openai")
    with ChatServer(lambda _: chat_server.status(503)) as server:
        teacher = TeacherConfig(kind="http", base_url=server.url, model="m", retries=0)
        config = recipe(tmp_path, sources=sources(flags=4), allot=AllotConfig(questions=8), teacher=teacher)
        with pytest.raises(BuildError, match=r"match 0: the teacher at .* failed 4 of 4 requests .* status 503"):
            build(config)
        assert not list(tmp_path.glob("steps/match/*"))
        server.reply = Oracle({})
        assert build(config).counts["select"]["accepted"] > 0


def test_a_topic_that_holds_too_much_is_parted_by_the_teacher(tmp_path):
    pytest.importorskip("openai")
    oracle = Oracle({})

    def parted(seen):
        task = task_of(seen.body["messages"])
        if "holds too much" in seen.text:
            proposals = [{"title": title, "about": f"{title}."} for title in ("Few digits", "Many digits", "Numbers")]
            return json.dumps({"proposals": proposals})
        if task and task["task"] == "match" and len(task["topics"]) == 3:
            few, digits = task["topics"][1:], len(task["truth"]["objects"])
            chosen = few[0] if digits < 4 else few[1] if digits > 4 else "scans.none"
            return json.dumps({"topic": chosen, "capabilities": []})
        return oracle(seen)

    with ChatServer(parted) as server:
        config = recipe(
            tmp_path,
            sources=sources(flags=4, sheets=8),
            allot=AllotConfig(questions=48),
            labels=LabelsConfig(balance=2),
            teacher=TeacherConfig("http", server.url, "m", retries=2),
        )
        production = build(config)
    audits = [row for row in rows(tmp_path, "audit.jsonl") if row["source"] == "sheets"]
    by_id = {row["id"]: row["truth"] for row in rows(tmp_path, "steps/images/00000.images.jsonl")} | {
        row["id"]: row["truth"] for row in rows(tmp_path, "steps/images/00001.images.jsonl")
    }
    assert list(production.counts) == list(STEPS)
    counts = production.counts["rematch"]
    for row in audits:
        digits = len(by_id[row["id"]]["objects"])
        wanted = "few-digits" if digits < 4 else "many-digits" if digits > 4 else "numbers"
        assert row["topic"] == f"scans.digits.{wanted}"
    assert counts["moved"] + counts["unmoved"] == len(audits) == 8
    assert counts["moved"] > 0
    assert production.counts["balance"]["topics_added"] == 2
    refused = [row for row in rows(tmp_path, "rejected.jsonl") if row["stage"] == "labels"]
    assert len(refused) == 1  # a title that is there
    assert "few-digits" in (tmp_path / "labels" / "topics.yaml").read_text()
    for record in read_records(production.records):
        assert record.labels["topic"][-1] in {row["topic"] for row in rows(tmp_path, "audit.jsonl")}
    with pytest.raises(ValueError, match=r"labels\.balance: expected 0 with teacher\.kind=embedded"):
        recipe(tmp_path, labels=LabelsConfig(balance=2))


def test_skipped_images_are_left_to_other_runs(tmp_path):
    def images(folder, **counts):
        build(recipe(folder, sources=sources(**counts), allot=AllotConfig(questions=16)))
        return [row["id"] for row in rows(folder, "audit.jsonl")]

    both = images(tmp_path / "both", flags=8)
    assert both == images(tmp_path / "a", flags=4) + images(tmp_path / "b", flags=4, skip={"flags": 4})
    with pytest.raises(ValueError, match=r"sources\.skip: expected keys among easy_vqa.*got 'flag'"):
        sources(skip={"flag": 4})

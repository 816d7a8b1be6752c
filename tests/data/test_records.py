"""Records: what is one and what is not, streams of lines that are hostile, and files that stand whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from m4ov.data.pictures import store_images, to_uri
from m4ov.data.records import Record, RecordError, Where, assistant, check, image, text, user
from m4ov.data.shards import WriteError, read_records, shards_of, write_records, write_shards
from tests.data.record_files import draw_records, encoded, one, picture, random

WHERE = Where("x.jsonl", 7)
FULL = one(
    labels={"topic": ["a", "b", "c"], "capability": ["d", "e", "f"]},
    difficulty="hard",
    kind="count",
    rejected=["that"],
    reward={"style": "rule", "ground_truth": 3},
    meta={"source": "photo", "max_pixels": 4096, "nested": [1, None, {"a": 0.5}]},
)


def test_a_record_is_its_line():
    record = Record.from_json(FULL, WHERE)
    assert record.to_json() == FULL
    assert Record.from_json(json.loads(record.to_line())) == record
    assert (record.question, record.answer, record.images, record.max_pixels) == ("what?", "this", ["a.png"], 4096)
    plain = Record.from_json({"id": "b", "messages": [{"role": "user", "content": "hi"}, assistant("ho")]})
    assert plain.messages[0] == user("hi")
    assert plain.to_json().keys() == {"id", "messages"}
    assert plain.max_pixels is None


WRONG = [
    ([], "", "field"),
    (one(id=""), "id", "id"),
    (one(id="a\nb"), "id", "id"),
    (one(id=3), "id", "id"),
    (one(image="a.png"), "'image'", "field"),
    (one(messages=[]), "messages", "messages"),
    (one(messages="hi"), "messages", "messages"),
    (one(messages=[user("a")]), "messages[0]", "answer"),
    (one(messages=[user("a"), assistant("  \n")]), "messages[1].content", "answer"),
    (one(messages=[user("a"), {"role": "assistant", "content": ""}]), "messages[1].content", "answer"),
    (one(messages=[user("a"), {"role": "assistant", "content": []}]), "messages[1].content", "answer"),
    (one(messages=[assistant("a")]), "messages[0].role", "role"),
    (one(messages=[user("a"), user("b"), assistant("c")]), "messages[1].role", "role"),
    (one(messages=[{"role": "tool", "content": "a"}]), "messages[0].role", "role"),
    (one(messages=[{"role": ["user"], "content": "a"}]), "messages[0].role", "role"),
    (one(messages=[{"role": "system", "content": "a"}]), "messages", "messages"),
    (one(messages=[user(), assistant("a")]), "messages[0].content", "messages"),
    (one(messages=[user("a"), {"role": "assistant", "content": [image("a.png")]}]), "messages[1].content[0]", "role"),
    (one(messages=[user(image("")), assistant("a")]), "messages[0].content[0].image", "image"),
    (one(messages=[user({"type": "video", "video": "a"}), assistant("a")]), "messages[0].content[0]", "messages"),
    (one(messages=[user({"type": "image"}), assistant("a")]), "messages[0].content[0]", "messages"),
    (one(messages=[user({**text("a"), "more": 1}), assistant("a")]), "messages[0].content[0]", "messages"),
    (one(messages=[user("\ud800"), assistant("a")]), "messages[0].content[0].text", "encoding"),
    (one(messages=[{**user("a"), "weight": 1}, assistant("a")]), "messages[0].weight", "field"),
    (one(labels=["a"]), "labels", "labels"),
    (one(labels={"topic": "a"}), "labels.topic", "labels"),
    (one(labels={"topic": ["a", 1]}), "labels.topic", "labels"),
    (one(difficulty="trivial"), "difficulty", "difficulty"),
    (one(kind=3), "kind", "field"),
    (one(rejected="no"), "rejected", "rejected"),
    (one(rejected=["no", " "]), "rejected[1]", "rejected"),
    (one(messages=[user("a")], rejected=["no"], reward={"a": 1}), "rejected", "rejected"),
    (one(reward=[1]), "reward", "field"),
    (one(meta={"x": float("nan")}), "meta", "field"),
    (one(meta={"max_pixels": 0}), "meta.max_pixels", "field"),
    (one(meta={"max_pixels": True}), "meta.max_pixels", "field"),
]


@pytest.mark.parametrize(("value", "field", "kind"), WRONG)
def test_what_is_no_record_names_file_line_and_field(value, field, kind):
    with pytest.raises(RecordError) as caught:
        Record.from_json(value, WHERE)
    error = caught.value
    assert (error.where, error.field, error.kind) == (WHERE, field, kind)
    assert str(error).startswith("x.jsonl, line 7: " + (f"{field}: " if field else ""))
    assert len(str(error)) < 300
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.to_json(), str(copy)) == (error.to_json(), str(error))


def test_a_question_may_stay_open_if_it_is_rewarded():
    open_end = Record.from_json(one(messages=[user("a")], reward={"ground_truth": "b"}))
    assert (open_end.question, open_end.answer) == ("a", "")


def test_huge_values_make_short_messages():
    for value in ("x" * 10**6, ["x" * 100] * 10**5, {str(n): n for n in range(10**5)}):
        with pytest.raises(RecordError) as caught:
            Record.from_json(one(difficulty=value), WHERE)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_shards_hold_what_was_written(tmp_path, suffix):
    records = [Record.from_json(FULL), *draw_records(random(), ["a.png", "b.jpg"], 50)]
    paths = write_shards(records, tmp_path, shard_records=20, suffix=suffix)
    assert [path.name for path in paths] == [f"records-0000{n}-of-00003{suffix}" for n in range(3)]
    assert sorted(tmp_path.iterdir()) == paths
    assert list(read_records(tmp_path)) == [Record.from_json(record.to_json()) for record in records]
    assert next(iter(read_records(tmp_path, absolute=True))).images == [str(tmp_path / "a.png")]
    with pytest.raises(WriteError, match="records-00000-of-00003"):
        write_shards(records, tmp_path, suffix=suffix)
    paths = write_shards(records[:40], tmp_path, shard_records=20, suffix=suffix, replace=True)
    assert len(paths) == 2
    assert sorted(tmp_path.iterdir()) == paths
    paths[0].unlink()
    with pytest.raises(RecordError, match=r"missing records-00000-of-00002.* \(1 of 2 are there\)"):
        shards_of(tmp_path)


def test_writing_nothing_and_writing_what_is_wrong(tmp_path):
    assert write_records([], tmp_path / "none.jsonl") == 0
    assert list(read_records(tmp_path / "none.jsonl")) == []
    assert len(write_shards([], tmp_path / "empty")) == 1
    kept = Record("a", [user("a"), assistant("b")])
    for records, kind in (([kept, kept], "duplicate id"), ([kept, Record("b", [user("a")])], "answer")):
        for suffix in (".jsonl", ".parquet"):
            with pytest.raises(RecordError) as caught:
                write_records(records, tmp_path / f"new{suffix}")
            assert (caught.value.where.line, caught.value.kind) == (2, kind)
    with pytest.raises(ValueError, match=r"ends in \.jsonl or \.parquet"):
        write_records([kept], tmp_path / "a.csv")

    def failing():
        yield kept
        raise ConnectionResetError("the teacher is gone")

    with pytest.raises(ConnectionResetError, match="the teacher is gone"):  # no fault of the file
        write_records(failing(), tmp_path / "new.jsonl")
    with pytest.raises(ConnectionResetError, match="the teacher is gone"):
        write_shards(failing(), tmp_path / "more")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "none.jsonl",
        "records-00000-of-00001.jsonl",
    ]


def test_bad_lines_are_named_and_passed_over(tmp_path):
    path = tmp_path / "bad.jsonl"
    good = json.dumps(one()).encode()
    lines = [
        b"\xef\xbb\xbf" + good,  # a byte order mark
        b"",
        b"{",
        b'{"id": "x", "messages": "\xff"}',
        json.dumps(one(messages=[user("q"), assistant("")])).encode(),
        good,  # once more
        json.dumps(one(id="b")).encode() + b"\r",
        b"[" * 100_000,
        b'{"id": NaN}',
        b'{"id": ' + b"1" * 10_000 + b"}",
        b"null",
        json.dumps(one(id="c")).encode(),  # without an end
    ]
    path.write_bytes(b"\n".join(lines))
    found: list[RecordError] = []
    assert [record.id for record in read_records(path, on_error=found.append)] == ["a", "b", "c"]
    assert [(error.where.line, error.kind) for error in found] == [
        (3, "not JSON"),
        (4, "encoding"),
        (5, "answer"),
        (6, "duplicate id"),
        (8, "not JSON"),
        (9, "not JSON"),
        (10, "not JSON"),
        (11, "field"),
    ]
    assert all(error.where.file == str(path) for error in found)
    with pytest.raises(RecordError, match="line 3"):
        list(read_records(path))


def test_a_line_of_100_mb_is_not_read_into_memory(tmp_path):
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(json.dumps(one()).encode() + b"\n")
        begin = file.tell()
        file.seek(100 * 2**20, os.SEEK_CUR)  # a hole: no disk, no time
        file.write(b"\n")
        size = file.tell() - begin
        file.write(json.dumps(one(id="b")).encode() + b"\n")
    found: list[RecordError] = []
    tracemalloc.start()
    try:
        assert [record.id for record in read_records(path, on_error=found.append, limit=2**20)] == ["a", "b"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [(error.where.line, error.kind) for error in found] == [(2, "line too long")]
    assert f"{size / 2**20:.1f} MiB; at most 1.0 MiB" in str(found[0])
    assert peak < 8 * 2**20


def test_the_limit_is_of_the_line_without_its_end(tmp_path):
    line = json.dumps(one()).encode()
    path = tmp_path / "a.jsonl"
    for end in (b"\n", b""):
        path.write_bytes(line + end)
        assert len(list(read_records(path, limit=len(line)))) == 1
        with pytest.raises(RecordError, match="at most"):
            list(read_records(path, limit=len(line) - 1))


def test_a_truncated_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    write_records(draw_records(random(), [], 30), path)
    data = path.read_bytes()
    for cut in (0, 3, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        found: list[RecordError] = []
        assert list(read_records(path, on_error=found.append)) == []
        assert [(error.kind, error.where.file) for error in found] == [("file", str(path))]


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(RecordError, match="no such file"):
        list(read_records(tmp_path / "none.jsonl"))
    with pytest.raises(RecordError, match=r"no file \*\.jsonl"):
        list(read_records(tmp_path))


_FULL_DISK = """
import random, resource, signal, sys
from pathlib import Path
from m4ov.data.quarantine import Quarantine
from m4ov.data.records import Record, RecordError, Where, assistant, user
from m4ov.data.shards import WriteError, write_records, write_shards
folder = Path(sys.argv[1])
quarantine = Quarantine(folder / "quarantine.jsonl", 0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
draw = random.Random(1)
records = [Record(str(n), [user(draw.randbytes(250).hex()), assistant("a")]) for n in range(2000)]
for write in (
    lambda: write_records(records, folder / "a.jsonl"),
    lambda: write_records(records, folder / "a.parquet"),
    lambda: write_shards(records, folder / "shards", shard_records=500),
    lambda: [quarantine.add(RecordError(Where("a", n), "", "image", "x" * 100)) for n in range(1000)],
):
    try:
        write()
    except WriteError as error:
        print(error)
"""


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    (tmp_path / "a.jsonl").write_text("former")
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert all("cannot be written (File too large)" in line for line in lines[:3]), lines
    assert "quarantine.jsonl: cannot be written (" in lines[3]
    assert (tmp_path / "a.jsonl").read_text() == "former"
    quarantine = tmp_path / "quarantine.jsonl"  # which is appended to: whole lines
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == [tmp_path / "a.jsonl", quarantine]
    rows = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [row["line"] for row in rows] == list(range(len(rows)))
    assert len(rows) > 100
    assert quarantine.read_text().endswith("\n")


def test_embedded_images_become_files(tmp_path):
    data = encoded(picture(random(), 20, 30))
    record = Record("a", [user(image(to_uri(data)), image("b.png"), image(to_uri(data)), "?"), assistant("x")])
    stored = store_images(record, tmp_path)
    check(stored)
    first, second, third = stored.images
    assert (second, third) == ("b.png", first)
    assert first.endswith(".png")
    assert (tmp_path / first).read_bytes() == data
    assert len(list((tmp_path / "images").iterdir())) == 1
    broken = Record("a", [user(image(to_uri(b"no image")), "?"), assistant("x")])
    with pytest.raises(RecordError, match=r"x\.jsonl, line 7: images: .*not an image") as caught:
        store_images(broken, Path(tmp_path), WHERE)
    assert (caught.value.kind, caught.value.id) == ("image", "a")

"""Other tools' files: read from real ones, told apart by what is in them, and what is wrong with them named."""

from __future__ import annotations

import copy
import io
import json
import tarfile

import pyarrow
import pytest
from pyarrow import parquet
from rich.console import Console

from m4ov.data.formats import FORMATS, FormatError, convert, detect, read, to_messages
from m4ov.data.pictures import to_uri
from m4ov.data.records import Record, RecordError, Where, assistant, image, text, user
from m4ov.data.shards import read_records, write_records
from m4ov.data.validation import validate
from tests.data.record_files import draw_images, draw_records, encoded, one, picture, random

PNG = encoded(picture(random(1), 12, 17))
URI = to_uri(PNG)
CHAT = [{"role": "user", "content": "<image>what? <image>"}, {"role": "assistant", "content": "this"}]
SHOWN = [user(image("a.png"), "what? ", image("b.png")), assistant("this")]
TWO = ["a.png", "b.png"]

# format, row, the record's fields
ROWS = [
    (
        "llama-factory",
        {
            "conversations": [{"from": "human", "value": "<image>what? <image>"}, {"from": "gpt", "value": "this"}],
            "system": "be brief",
            "images": TWO,
        },
        {"messages": [{"role": "system", "content": [text("be brief")]}, *SHOWN]},
    ),
    (
        "llama-factory",
        {
            "conversations": [{"from": "human", "value": "what?"}],
            "chosen": {"from": "gpt", "value": "this"},
            "rejected": {"from": "gpt", "value": "that"},
        },
        {"messages": [user("what?"), assistant("this")], "rejected": ["that"]},
    ),
    (
        "llama-factory",
        {
            "instruction": "<image>what?",
            "input": "now",
            "output": "this",
            "history": [["hi", "ho"]],
            "system": "be brief",
            "images": ["a.png"],
        },
        {
            "messages": [
                {"role": "system", "content": [text("be brief")]},
                *(user("hi"), assistant("ho"), user(image("a.png"), "what?\nnow"), assistant("this")),
            ]
        },
    ),
    (
        "ms-swift",
        {"messages": CHAT, "images": TWO, "rejected_response": "that"},
        {"messages": SHOWN, "rejected": ["that"]},
    ),
    (
        "ms-swift",
        {"messages": CHAT, "images": TWO, "rejected_messages": [CHAT[0], {"role": "assistant", "content": "that"}]},
        {"messages": SHOWN, "rejected": ["that"]},
    ),
    ("ms-swift", {"id": 7, "messages": CHAT, "images": TWO}, {"id": "7", "messages": SHOWN}),
    (
        "trl",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, text("what? "), {"type": "image"}]},
                {"role": "assistant", "content": [text("this")]},
            ],
            "images": TWO,
        },
        {"messages": SHOWN},
    ),
    (
        "trl",
        {
            "prompt": [{"role": "user", "content": "what?"}],
            "completion": [{"role": "assistant", "content": "this"}],
            "images": TWO,
        },
        {"messages": [user(image("a.png"), image("b.png"), "what?"), assistant("this")]},
    ),
    (
        "trl",
        {"prompt": "what?", "chosen": "this", "rejected": "that"},
        {"messages": [user("what?"), assistant("this")], "rejected": ["that"]},
    ),
    (
        "trl",
        {
            "chosen": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "this"}],
            "rejected": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}],
        },
        {"messages": [user("what?"), assistant("this")], "rejected": ["that"]},
    ),
    (
        "verl",
        {
            "data_source": "geo3k",
            "prompt": CHAT[:1],
            "images": TWO,
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "48"},
            "extra_info": {"split": "train", "index": 3},
        },
        {
            "messages": SHOWN[:1],
            "reward": {"style": "rule", "ground_truth": "48"},
            "meta": {"data_source": "geo3k", "ability": "math", "extra_info": {"split": "train", "index": 3}},
        },
    ),
    (
        "openai",
        {
            "messages": [
                {"role": "developer", "content": "be brief"},
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": URI}},
                        text("is <image> a word?"),
                    ],
                },
                {"role": "assistant", "content": "yes"},
            ],
            "metadata": {"topic": "words"},
        },
        {
            "messages": [
                {"role": "system", "content": [text("be brief")]},
                user(image(URI), "is <image> a word?"),
                assistant("yes"),
            ],
            "meta": {"topic": "words"},
        },
    ),
    ("records", one(reward={"a": 1}), {"id": "a", "messages": one()["messages"], "reward": {"a": 1}}),
]
NAMES = [f"{name}-{number}" for number, (name, _, _) in enumerate(ROWS)]


def read_all(path, **options) -> list[Record]:
    return [record for _, record in read(path, **options)]


@pytest.mark.parametrize(("name", "row", "expected"), ROWS, ids=NAMES)
def test_rows_of_json_become_records(tmp_path, name, row, expected):
    for path, content, id in (
        (tmp_path / "d.jsonl", f"{json.dumps(row)}\n\n", "d-jsonl-00000001"),
        (tmp_path / "d.json", json.dumps([row], indent=2), "d-json-00000001"),
    ):
        path.write_text(content)
        assert detect(path).name == name
        (record,) = read_all(path)
        assert record.to_json() == {"id": id, **expected}


# A column has one type: contents are all texts, or all blocks.
IN_TABLES = [row for row in ROWS if row[0] != "openai" and "history" not in row[1]]


@pytest.mark.parametrize(("name", "row", "expected"), IN_TABLES)
def test_rows_of_parquet_become_the_same(tmp_path, name, row, expected):
    row = copy.deepcopy(row)
    if row.get("images"):  # as Hugging Face's datasets have them
        paths = [{"bytes": None, "path": path} for path in row["images"][1:]]
        row["images"] = [{"bytes": PNG, "path": None}, *paths]
        expected = json.loads(json.dumps(expected).replace('"a.png"', json.dumps(URI)))
    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    assert detect(path).name == name
    (record,) = read_all(path)
    assert record.to_json() == {"id": "d-parquet-00000001", **expected}


def tar_of(path, members: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_webdataset_tars(tmp_path, suffix):
    jpeg = encoded(picture(random(2), 16, 16), "JPEG")
    inside = {"messages": CHAT, "images": ["0.png", "s/2.1.jpg"]}
    own = one(messages=[user(image("png"), "what?"), assistant("this")], kind="k")
    talk = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}]
    members = {
        "s/0.png": PNG,
        "s/0.txt": b"a caption\n",
        "s/1.jpg": jpeg,
        "s/1.json": json.dumps({"caption": "another", "url": "http://x"}).encode(),
        "s/2.0.png": PNG,
        "s/2.1.jpg": jpeg,
        "s/2.json": json.dumps(inside).encode(),
        "s/3.JPG": jpeg,
        "s/3.json": json.dumps({"conversations": talk}).encode(),
        "s/4.png": PNG,
        "s/4.json": json.dumps(own).encode(),
    }
    path = tmp_path / f"shard{suffix}"
    tar_of(path, members, "w:gz" if suffix.endswith("gz") else "w")
    assert detect(path).name == "webdataset"
    assert [record.to_json() for record in read_all(path)] == [
        {"id": "s/0", "messages": [user(image(URI)), assistant("a caption")]},
        {"id": "s/1", "messages": [user(image(to_uri(jpeg))), assistant("another")], "meta": {"url": "http://x"}},
        {"id": "s/2", "messages": [user(image(URI), "what? ", image(to_uri(jpeg))), assistant("this")]},
        {"id": "s/3", "messages": [user(image(to_uri(jpeg)), "?"), assistant("!")]},
        {"id": "a", "messages": [user(image(URI), "what?"), assistant("this")], "kind": "k"},
    ]


def test_hostile_tars(tmp_path):
    path = tmp_path / "a.tar"
    tar_of(
        path,
        {
            "0.png": PNG,  # no text
            "1.txt": b"no image",
            "2.png": PNG,
            "2.json": b"{",
            "3.png": PNG,
            "3.txt": b"\xff",
            "4.png": PNG,
            "4.json": b"[]",
            "5.bin": bytes(10_000),  # too long
            "5.txt": b"x",
            "6.png": PNG,
            "6.txt": b"right",
        },
    )
    found: list[RecordError] = []
    assert [record.id for record in read_all(path, on_error=found.append, limit=2_000)] == ["6"]
    assert [(error.where.line, error.field, error.kind) for error in found] == [
        (1, "json", "messages"),
        (2, "jpg", "image"),
        (3, "json", "not JSON"),
        (4, "txt", "encoding"),
        (5, "json", "field"),
        (6, "5.bin", "line too long"),
    ]
    draw, members = random(11), {}
    for number in range(40):
        members |= {f"{number}.png": encoded(picture(draw, 12, 17)), f"{number}.txt": b"words"}
    for mode in ("w", "w:gz"):
        tar_of(path, members, mode)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        found.clear()
        records = read_all(path, on_error=found.append)
        assert len(records) < 40
        assert [record.id for record in records] == [str(n) for n in range(len(records))]
        assert [(error.kind, error.where.file) for error in found] == [("file", str(path))]
    path.write_bytes(b"no tar at all" * 100)
    report = validate(path)
    assert dict(report.counts) == {"file": 1}


WRONG = [
    (
        {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]},
        "images",
        "image count",
    ),
    ({"messages": CHAT, "images": TWO[:1]}, "images", "image count"),
    ({"messages": CHAT, "images": [*TWO, "c.png"]}, "images", "image count"),
    ({"messages": CHAT, "images": [None, "b.png"]}, "images[0]", "image"),
    ({"messages": CHAT, "images": 3}, "images", "image"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": ""}], "images": TWO}, "messages[1].content", "answer"),
    ({"messages": [CHAT[0], {"role": "assistant"}], "images": TWO}, "messages[1]", "messages"),
    ({"messages": [CHAT[0], {"role": "robot", "content": "a"}], "images": TWO}, "messages[1].role", "role"),
    ({"messages": CHAT, "images": TWO, "rejected_response": ""}, "rejected_response", "answer"),
    ({"messages": CHAT, "images": TWO, "rejected_messages": CHAT[:1]}, "rejected_messages", "rejected"),
    ({"messages": CHAT, "images": TWO, "videos": ["a.mp4"]}, "videos", "video"),
    ({"instruction": "a", "output": " "}, "messages[1].content", "answer"),
    ({"instruction": "a", "output": "b", "history": [["x"]]}, "history[0]", "messages"),
    ({"prompt": "a", "completion": None}, "completion", "messages"),
    ({"chosen": [*CHAT[:1], CHAT[1]], "rejected": [CHAT[1]]}, "rejected", "rejected"),
    ({"prompt": [], "reward_model": {"a": 1}}, "prompt", "messages"),
    ({"prompt": CHAT[:1], "reward_model": {}}, "reward_model", "field"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0]", "messages"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "messages"),
]


@pytest.mark.parametrize(("row", "field", "kind"), WRONG)
def test_what_is_wrong_is_named_with_file_line_and_field(tmp_path, row, field, kind):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(RecordError) as caught:
        read_all(path)
    assert (caught.value.where, caught.value.field, caught.value.kind) == (Where(str(path), 1), field, kind)


def test_no_row_makes_a_reader_raise_anything_else(tmp_path):
    """Rows of every format with parts replaced by something else, read as every format."""
    draw = random(3)
    junk = [None, 3, -1.5, True, "", "<image>", "x", [], {}, [[]], [None], {"type": "image"}, {"bytes": 5}, [{"a": {}}]]

    def spoiled(value):
        if draw.random() < 0.15:
            return junk[int(draw.integers(len(junk)))]
        if isinstance(value, dict):
            return {key: spoiled(entry) for key, entry in value.items() if draw.random() > 0.05}
        return [spoiled(entry) for entry in value] if isinstance(value, list) else value

    rows = [spoiled(copy.deepcopy(row)) for _, row, _ in ROWS for _ in range(60)]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in FORMATS:
        found: list[RecordError] = []
        right = sum(1 for _ in read(path, name, on_error=found.append))
        assert right + len(found) == len(rows)
        assert all(error.where.line and str(error).startswith(f"{path}, line ") for error in found)


def test_a_file_of_no_format_says_why(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(FormatError) as caught:
        detect(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: no format fits rows of answer, question (")
    assert all(f"{name}: " in message for name in FORMATS)
    with pytest.raises(FormatError, match=r"expected one of webdataset, records, .*; got 'alpaca2'"):
        read_all(path, format="alpaca2")
    path.write_text("")
    with pytest.raises(FormatError, match="the file is empty"):
        detect(path)


def test_arrays_are_read_an_element_at_a_time(tmp_path, monkeypatch):
    from m4ov.data.formats import containers

    monkeypatch.setattr(containers, "_CHUNK", 7)  # so that elements, numbers and strings are cut
    rows = [{"instruction": f"q{n}\n\u00e4\u4f60", "output": "x" * n} for n in range(1, 40)]
    path = tmp_path / "d.json"
    for indent in (None, 1):
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
        assert [record.answer for record in read_all(path)] == [row["output"] for row in rows]
    lines = path.read_text(encoding="utf-8").splitlines()
    broken = next(n for n, line in enumerate(lines) if '"q20' in line)
    lines[broken] = lines[broken].replace(":", "=")
    path.write_text("\n".join(lines), encoding="utf-8")
    found: list[RecordError] = []
    assert len(read_all(path, on_error=found.append)) == 19
    ((where, kind),) = [(error.where, error.kind) for error in found]
    assert (where.line, where.element, kind) == (broken, 20, "not JSON")  # the line on which the element begins
    for content, count in (("[]", 0), ('[{"instruction": "a", "output": "b"}', 1), ("[ ", 0)):
        path.write_text(content)
        found.clear()
        assert len(read_all(path, format="llama-factory", on_error=found.append)) == count
        assert len(found) == (content != "[]")
    path.write_text(json.dumps([{"instruction": "a" * 5000, "output": "b"}]))
    with pytest.raises(RecordError, match="an element of more than"):
        read_all(path, format="llama-factory", limit=1000)


def test_what_is_converted_is_written_as_records(tmp_path):
    draw_images(tmp_path / "from", random(4), 2)
    row = {"messages": CHAT, "images": ["images/0.jpg", URI], "rejected_response": "that"}
    (tmp_path / "from" / "d.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "images": []}))
    found: list[RecordError] = []
    paths = convert(tmp_path / "from" / "d.jsonl", tmp_path / "to", on_error=found.append)
    assert [path.name for path in paths] == ["records-00000-of-00001.jsonl"]
    assert [error.kind for error in found] == ["image count"]
    (record,) = read_records(tmp_path / "to")
    assert record.images[0] == "../from/images/0.jpg"
    assert (tmp_path / "to" / record.images[1]).read_bytes() == PNG
    assert record.rejected == ["that"]
    assert detect(paths[0]).name == "records"
    assert validate(tmp_path / "to", images="decode").ok


def test_openai_messages_come_back(tmp_path):
    records = draw_records(random(5), ["a.png"], 20)
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"id": r.id, "messages": to_messages(r)}) + "\n" for r in records))
    assert detect(path).name == "openai"
    assert read_all(path) == records


def test_validation_names_every_problem(tmp_path):
    names = draw_images(tmp_path, random(6), 4)
    (tmp_path / "images/cut.png").write_bytes(PNG[: len(PNG) // 2])
    (tmp_path / "images/no.png").write_bytes(b"no image")
    (tmp_path / "images/long.png").write_bytes(encoded(picture(random(7), 1, 300)))
    shown = [
        *names[:1],
        "images/cut.png",
        "images/no.png",
        "images/none.png",
        "images/long.png",
        "http://x/a.png",
        "images",
    ]
    lines = [
        json.dumps(one(id=f"i{n}", messages=[user(image(name), "?"), assistant("!")])) for n, name in enumerate(shown)
    ]
    lines += ["{", json.dumps(one(id="i0")), json.dumps(one(id="e", messages=[user("?"), assistant("")]))]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    (tmp_path / "other.jsonl").write_text('{"question": 1}\n')
    write_records(draw_records(random(8), names, 30), tmp_path / "z.parquet")
    report = validate(tmp_path, images="decode", problems_to=tmp_path / "out" / "problems.jsonl")
    assert not report.ok
    assert [(f.path.name, f.format, f.rows, f.right) for f in report.files] == [
        ("other.jsonl", "?", 1, 0),
        ("records.jsonl", "records", 10, 1),
        ("z.parquet", "records", 30, 30),
    ]
    assert dict(report.counts) == {"format": 1, "image": 7, "not JSON": 1, "duplicate id": 1, "answer": 1}
    places = [(p.where.line, p.field, p.kind) for p in report.problems if p.where.file.endswith("records.jsonl")]
    assert places == [
        *((line, "images[0]", "image") for line in range(2, 8)),
        (8, "", "not JSON"),
        (9, "id", "duplicate id"),
        (9, "images[0]", "image"),
        (10, "messages[1].content", "answer"),
    ]
    written = [json.loads(line) for line in (tmp_path / "out" / "problems.jsonl").read_text().splitlines()]
    assert written == [problem.to_json() for problem in report.problems]
    header = validate(tmp_path / "records.jsonl", images="header", keep=2)
    assert (header.counts["image"], len(header.problems)) == (6, 2)  # the cut one has its header
    assert validate(tmp_path / "records.jsonl", images="no").counts["image"] == 0
    console = Console(record=True, width=400)
    report.render(console)
    shown = console.export_text()
    assert all(name in shown for name in ("records.jsonl", "duplicate id", "line 9", "images[0]"))
    assert json.loads(json.dumps(report.to_json()))["ok"] is False


def test_validation_of_what_is_right_and_of_what_is_not_there(tmp_path):
    names = draw_images(tmp_path, random(9), 4)
    write_records(draw_records(random(10), names, 30), tmp_path / "a.jsonl")
    assert validate([tmp_path / "a.jsonl"], images="decode", threads=2).ok
    assert dict(validate(tmp_path / "none").counts) == {"file": 1}

    def unlabelled(record, where):
        raise RecordError(where, "labels", "labels", "no label", record.id)

    assert dict(validate(tmp_path / "a.jsonl", also=unlabelled).counts) == {"labels": 30}
    for folder in ("one", "two"):  # rows without ids are no duplicates
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "d.jsonl").write_text('{"instruction": "a", "output": "b"}')
    assert validate([tmp_path / "one", tmp_path / "two"]).ok
    with pytest.raises(FormatError):
        validate(tmp_path, "nothing")
    with pytest.raises(ValueError, match="images: expected no, header or decode"):
        validate(tmp_path, images="all")

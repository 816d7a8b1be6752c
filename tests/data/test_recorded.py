"""Files of records as splits, and splits in two."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from PIL import Image

from m4ov.data import DataError, Sample, Split
from m4ov.data.recorded import Asked, divide, recorded, recorded_by
from m4ov.data.records import Record, assistant, image, user
from m4ov.data.shards import write_records


def record(name: str, picture: str, question: str = "what?", answer: str = "that", **fields) -> Record:
    return Record(name, [user(image(picture), question), assistant(answer)], **fields)


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for name, size in (("a", (64, 64)), ("b", (48, 32))):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def test_records_of_one_image_share_it(folder):
    data = "data:image/png;base64," + base64.b64encode((folder / "b.png").read_bytes()).decode()
    records = [
        record("1", "a.png", "one?", " yes ", kind="counting"),
        record("2", "b.png", "two?"),
        record("3", "a.png", "three?"),
        record("4", data, "four?"),
    ]
    write_records(records, folder / "records.jsonl")
    split = recorded("pool", folder / "records.jsonl", 64)
    assert split.name == "pool"
    assert split.samples == (
        Sample(0, "one?", "yes", "counting"),
        Sample(0, "three?", "that", "record"),
        Sample(1, "two?", "that", "record"),
        Sample(2, "four?", "that", "record"),
    )
    assert split.images.shape == (3, 64, 64, 3)
    assert np.array_equal(split.images[0], np.asarray(Image.open(folder / "a.png")))
    assert np.array_equal(split.images[1], split.images[2])  # the same picture, in a file and in the record


def test_records_are_parted_and_asked_as_one_likes(folder):
    records = [record("1", "a.png", "One?"), record("2", "b.png", "Two?"), record("3", "a.png", "Three?")]
    write_records(records, folder / "records.jsonl")

    def asked(one: Record) -> Asked | None:
        return None if one.id == "3" else Asked(f"split {one.id}", one.question.lower(), "kind")

    found = recorded_by(folder / "records.jsonl", 64, asked)
    assert {name: split.samples for name, split in found.items()} == {
        "split 1": (Sample(0, "one?", "that", "kind"),),
        "split 2": (Sample(0, "two?", "that", "kind"),),
    }
    assert all(split.name == name and len(split.images) == 1 for name, split in found.items())
    assert recorded_by(folder / "records.jsonl", 64, lambda _: None) == {}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([record("x", "none.png")], r"records\.jsonl: record x: image .*none\.png: no such file"),
        ([record("x", "records.jsonl")], r"record x: image .*records\.jsonl: cannot be read"),
        ([record("x", "data:image/png;base64,AAAA")], "record x: its data: URI is no image"),
        ([record("x", "data:image/png;base64,!!")], "record x: its data: URI is no image"),
        ([Record("x", [user("what?"), assistant("that")])], "record x: expected one image, got 0"),
        (
            [Record("x", [user(image("a.png"), image("a.png"), "?"), assistant("b")])],
            "record x: expected one image, got 2",
        ),
        ([Record("x", [user(image("a.png")), assistant("that")])], "record x: expected a question and its answer"),
        (
            [Record("x", [user(image("a.png"), "?"), assistant("b"), user("and?"), assistant("c")])],
            "record x: expected a question and its answer, got turns of .'user', 'assistant', 'user'",
        ),
        ([], "no record"),
    ],
)
def test_what_is_no_sample_is_named(folder, lines, message):
    file = folder / "records.jsonl"
    file.write_text("".join(f"{json.dumps(line.to_json())}\n" for line in lines))
    with pytest.raises(DataError, match=message):
        recorded("pool", file, 64)


def test_a_line_that_is_no_record_is_named(folder):
    file = folder / "records.jsonl"
    file.write_text(f'{json.dumps(record("1", "a.png").to_json())}\n{{"id": "2"}}\n')
    with pytest.raises(DataError, match=r"records\.jsonl, line 2: messages"):
        recorded("pool", file, 64)
    with pytest.raises(DataError, match="no such file"):
        recorded("pool", folder / "nothing.jsonl", 64)


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.5, 0.9])
def test_a_split_in_two_keeps_every_question_with_its_image(share):
    images = np.zeros((30, 16, 16, 3), np.uint8) + np.arange(30, dtype=np.uint8)[:, None, None, None]
    samples = tuple(Sample(n, f"{n} {k}", str(n), "") for n in range(30) for k in range(1 + n % 3))
    parts = divide(Split("s", images, samples), share)
    assert abs(len(parts[0].images) - 30 * share) < 1
    assert sum(len(part.images) for part in parts) == 30
    found = [sample for part in parts for sample in part.samples]
    assert sorted(s.question for s in found) == sorted(s.question for s in samples)
    for part in parts:
        assert part.name == "s"
        assert all((part.images[s.image] == int(s.answer)).all() for s in part.samples)


def test_too_few_images_to_divide():
    split = Split("few", np.zeros((1, 16, 16, 3), np.uint8), (Sample(0, "q", "a", ""),))
    with pytest.raises(DataError, match=r"few: 1 images are too few to be divided at 0\.5"):
        divide(split, 0.5)

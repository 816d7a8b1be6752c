"""The streaming loader: every record once an epoch, the same on any number of ranks, ahead or not, and later on."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from m4ov.data import DataError
from m4ov.data.ahead import Ahead
from m4ov.data.chat import PLAIN, ChatEncoder
from m4ov.data.index import RecordIndex
from m4ov.data.pixels import PixelOptions
from m4ov.data.records import Record, RecordError, Where, assistant, image, user
from m4ov.data.shards import read_records, write_records, write_shards
from m4ov.data.stream import RecordStream, StreamError
from m4ov.models.qwen3_vl import Config, new, qwen3_vl_config
from m4ov.recipe import ModelConfig, OptimConfig, TextConfig, TrainConfig, VisionConfig
from m4ov.sft.training import loss_of
from m4ov.train import Interrupted, train
from m4ov_kernels.packing import PackedBatch
from tests.data.record_files import draw_images, draw_records, encoded, picture, random, said, tokenizer
from tests.tiny_task import equal_states, quiet

PIXELS = PixelOptions(patch_size=4, merge_size=2, min_pixels=256, max_pixels=1024)
CAPACITY = 160
STEPS = 6


def encoder() -> ChatEncoder:
    return ChatEncoder(tokenizer(), PIXELS, PLAIN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Records with several images and turns, in three shards of JSONL and one of Parquet."""
    folder, draw = tmp_path_factory.mktemp("data"), random(1)
    names = draw_images(folder, draw)
    records = draw_records(draw, names, 70)
    write_shards(records[:50], folder, shard_records=20)
    write_records(records[50:], folder / "table.parquet")
    return folder


def stream(folder, **options) -> RecordStream:
    return RecordStream(folder, encoder(), **{"capacity": CAPACITY, "rows": 4, "seed": 3, **options})


def tensors(batch: PackedBatch) -> list[torch.Tensor]:
    found = [batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens]
    vision = batch.images
    return found if vision is None else [*found, vision.pixel_values, vision.grid_thw, vision.positions]


def same(one: list[PackedBatch], other: list[PackedBatch]) -> bool:
    """To the bit."""
    pairs = [(tensors(a), tensors(b)) for a, b in zip(one, other, strict=True)]
    return all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in pairs)


def steps_of(source, first: int = 0, last: int = STEPS) -> list[list[PackedBatch]]:
    return [list(source.batches(step)) for step in range(first, last)]


def rows_of(batch: PackedBatch) -> list[tuple[int, ...]]:
    """The tokens of each sample."""
    return [tuple(batch.input_ids[a:b].tolist()) for a, b in pairwise(batch.cu_seqlens.tolist())]


def test_every_record_comes_once_an_epoch_whole(folder):
    one, encode = stream(folder), encoder()
    records = list(read_records(folder))
    expected = Counter(tuple(encode(record, folder, max_length=CAPACITY).input_ids) for record in records)
    seen: Counter = Counter()
    while one.packed.read < 5 * len(records):
        for batch in one.batches(one.packed.step):
            assert batch.tokens <= CAPACITY
            seen.update(rows_of(batch))
            shown = (batch.input_ids == encode.image_token).sum()
            assert shown == (0 if batch.images is None else len(batch.images.features))
    whole = min(epoch for epoch, _ in one.packed.waiting)
    assert whole >= 2
    waiting = Counter(index for _, index in one.packed.waiting)
    seen.update({tuple(encode(records[n], folder, max_length=CAPACITY).input_ids): k for n, k in waiting.items()})
    assert sum(seen.values()) == one.packed.read
    epochs = one.packed.read // len(records)
    assert all(epochs * count <= seen[tokens] <= (epochs + 1) * count for tokens, count in expected.items())
    assert "bad" not in one.statistics()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_rows_of_one(folder, ranks):
    one, many = stream(folder), [stream(folder, rank=rank, ranks=ranks) for rank in range(ranks)]
    for step in range(STEPS):
        rows, parts = one.batches(step), [part.batches(step) for part in many]
        together: list[PackedBatch] = [None] * 4
        for rank, part in enumerate(parts):
            together[rank::ranks] = part
        assert same(rows, together)
    assert all(part.state_dict() == one.state_dict() for part in many)


@pytest.mark.parametrize("ahead", [False, True])
def test_it_goes_on_on_another_number_of_ranks(folder, ahead):
    expected = steps_of(stream(folder))
    first = stream(folder, rank=1, ranks=2)
    source = Ahead(first, depth=3) if ahead else first
    steps_of(source, 0, 3)
    state = json.loads(json.dumps(source.state_dict()))  # as a checkpoint keeps it
    assert state["step"] == 3
    for ranks in (1, 4):
        together: list[list] = [[None] * 4 for _ in range(3, STEPS)]
        for rank in range(ranks):
            other = stream(folder, rank=rank, ranks=ranks)
            other_source = Ahead(other) if ahead else other
            other_source.load_state_dict(state)
            for place, part in enumerate(steps_of(other_source, 3)):
                together[place][rank::ranks] = part
            if ahead:
                other_source.close()
        assert all(map(same, together, expected[3:]))
    if ahead:
        source.close()


@pytest.mark.parametrize("options", [{"depth": 1}, {"depth": 3, "threads": 2}])
def test_a_thread_ahead_makes_the_same(folder, options):
    expected = stream(folder)
    ahead = Ahead(stream(folder, workers=2), **options)
    for step in range(STEPS):
        assert same(list(ahead.batches(step)), expected.batches(step))
        assert ahead.state_dict() == expected.state_dict()  # not what was made since
    state = expected.state_dict()
    later = steps_of(ahead, STEPS, STEPS + 2)
    ahead.load_state_dict(state)
    assert all(map(same, steps_of(ahead, STEPS, STEPS + 2), later))
    worker = ahead._worker._thread
    ahead.close()  # and from there on again
    assert not worker.is_alive()
    assert all(map(same, steps_of(ahead, STEPS + 2, STEPS + 3), steps_of(expected, STEPS, STEPS + 3)[2:]))
    ahead.close()


def test_the_thread_leaves_the_training_its_threads(folder):
    before = torch.get_num_threads()
    seen: list[int] = []

    def training():
        torch.set_num_threads(before + 1)  # and has computed nothing yet
        ahead = Ahead(stream(folder), threads=1)
        ahead.batches(0)
        seen.append(torch.get_num_threads())
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        ahead.close()

    thread = threading.Thread(target=training)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    assert seen == [before + 1] * 2


def test_a_forgotten_thread_ends(folder):
    ahead = Ahead(stream(folder))
    ahead.batches(0)
    worker = ahead._worker._thread
    del ahead
    worker.join(timeout=30)
    assert not worker.is_alive()


def test_fill_on_lengths_as_they_are(tmp_path):
    """Questions about images, and a few long conversations: rows are 97% full."""
    draw = random(2)
    (tmp_path / "images").mkdir()
    names = []
    for number in range(20):
        names.append(f"images/{number}.png")
        picture(draw, *(int(side) for side in draw.integers(16, 80, 2))).save(tmp_path / names[-1])
    records = []
    for number in range(400):
        turns = 1 if draw.random() < 0.8 else int(draw.integers(2, 6))
        words = int(np.clip(draw.lognormal(2.5, 0.8), 1, 60))
        shown = [image(str(draw.choice(names)))] if draw.random() < 0.8 else []
        messages = []
        for turn in range(turns):
            messages += [user(*(shown if turn == 0 else []), said(draw, words)), assistant(said(draw, words))]
        records.append(Record(f"r{number}", messages))
    write_records(records, tmp_path / "a.jsonl")
    one = stream(tmp_path, capacity=512, rows=4)
    while one.packed.read < 2 * len(records):
        one.batches(one.packed.step)
    assert "bad" not in one.statistics()
    assert one.statistics()["fill"] >= 0.97


def spoil(folder, draw, count: int) -> None:
    """A data set of ``count`` records that can be used, among bad lines and images."""
    names = draw_images(folder, draw)
    whole = encoded(picture(draw, 40, 40))
    (folder / "images/cut.png").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (folder / "images/flipped.png").write_bytes(flipped)
    (folder / "images/no.png").write_bytes(b"no image")
    lines = [record.to_line() for record in draw_records(draw, names, count)]
    for place, name in enumerate(("cut", "flipped", "no", "none")):
        shown = [image(names[0]), image(f"images/{name}.png")]
        lines.insert(7 * place, Record(name, [user(*shown, "?"), assistant("!")]).to_line())
    lines.insert(3, '{"id": ')
    lines.insert(9, "")
    lines.insert(11, Record("long", [user("how " * 400), assistant("!")]).to_line())
    (folder / "a.jsonl").write_text("\n".join(lines))


def test_what_is_broken_is_named_counted_and_passed_over(tmp_path):
    count = 45
    spoil(tmp_path, random(3), count)
    quarantine = tmp_path / "out" / "quarantine.jsonl"
    options = {"quarantine": quarantine, "max_bad": 0.5}
    one = stream(tmp_path / "a.jsonl", **options)
    while one.packed.read < 2.5 * len(one.index):
        for batch in one.batches(one.packed.step):
            assert len(batch) >= 1
    named = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert sorted((row["id"], row["kind"]) for row in named) == [
        ("", "not JSON"),
        ("cut", "image"),
        ("flipped", "image"),
        ("long", "too long"),
        ("no", "image"),
        ("none", "image"),
    ]
    lines = (tmp_path / "a.jsonl").read_text().split("\n")
    for row in named:
        assert row["file"] == str(tmp_path / "a.jsonl")
        assert (row["id"] or '{"id": ') in lines[row["line"] - 1]
        assert row["field"].startswith("images[1]") or row["kind"] != "image" or "content[1]" in row["field"]
    found = one.statistics()
    assert (found["bad"], found["bad: image"], found["read"]) == (6, 4, count + 7)
    # Ranks agree; what only one can see, it names.
    quarantine.unlink()
    many = [stream(tmp_path / "a.jsonl", **options, rank=rank, ranks=2) for rank in range(2)]
    single = stream(tmp_path / "a.jsonl", max_bad=0.5)
    for step in range(one.packed.step):
        parts = [part.batches(step) for part in many]
        together: list[PackedBatch] = [None] * 4
        together[0::2], together[1::2] = parts
        assert same(single.batches(step), together)
    ids = []
    for path in quarantine.parent.iterdir():
        ids += [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert set(ids) == {"", "cut", "flipped", "long", "no", "none"}
    assert ids.count("none") == 1
    # Going on does not name them again.
    before = quarantine.read_text()
    again = stream(tmp_path / "a.jsonl", **options)
    for step in range(one.packed.step):
        again.batches(step)
    assert quarantine.read_text().startswith(before)
    assert len(quarantine.read_text().splitlines()) == 6


def test_a_row_of_nothing_but_broken_images_is_a_batch(tmp_path):
    whole = encoded(picture(random(4), 40, 40))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    write_records([Record("cut", [user(image("cut.png"), "?"), assistant("!")])], tmp_path / "a.jsonl")
    one = stream(tmp_path / "a.jsonl", rows=2, capacity=32)
    for step in range(2):
        for batch in one.batches(step):
            assert (batch.tokens, batch.num_labels, batch.images) == (1, 0, None)
    assert one.statistics()["bad"] == 1


def test_too_much_that_is_bad_is_an_error(tmp_path):
    names = [f"images/{n}.png" for n in range(50)]
    write_records(
        [Record(str(n), [user(image(name), "?"), assistant("!")]) for n, name in enumerate(names)], tmp_path / "a.jsonl"
    )
    with pytest.raises(DataError, match=r"17 of the 17 records read so far cannot be used \(image: 17\); the last: "):
        stream(tmp_path / "a.jsonl").batches(0)
    with pytest.raises(DataError, match=r"none of the 50 records can be used \(image: 50\)"):
        stream(tmp_path / "a.jsonl", max_bad=1.0).batches(0)
    with pytest.raises(RecordError, match=r"images/\d+\.png: no such file"):
        stream(tmp_path / "a.jsonl", on_bad="error").batches(0)


def test_long_records_lose_turns_or_go_or_stop_the_run(tmp_path):
    turns = [turn for n in range(5) for turn in (user("how many " * 10), assistant("can you see"))]
    write_records([Record("long", turns), Record("short", turns[:2])], tmp_path / "a.jsonl")
    one = stream(tmp_path / "a.jsonl", capacity=80, rows=1)
    one.batches(0)
    found = one.statistics()
    assert "bad" not in found
    assert found["read"] == 2
    assert found["turns dropped"] in (2, 4, 6, 8)
    one = stream(tmp_path / "a.jsonl", capacity=80, rows=1, too_long="drop")
    one.batches(0)
    assert one.statistics()["bad: too long"] == 1
    with pytest.raises(RecordError, match=r"line 1: messages: expected at most 80 tokens, got \d+ or more"):
        stream(tmp_path / "a.jsonl", capacity=80, rows=1, too_long="error").batches(0)


def test_an_error_ahead_surfaces_in_its_step_with_the_record(folder):
    class Failing(ChatEncoder):
        def __call__(self, record, *args, **options):
            if record.id == self.fails:
                raise ZeroDivisionError("a bug")
            return super().__call__(record, *args, **options)

    failing = Failing(tokenizer(), PIXELS, PLAIN)
    failing.fails = next(iter(read_records(folder))).id
    ahead = Ahead(RecordStream(folder, failing, capacity=CAPACITY, rows=1, seed=3), depth=8)
    with pytest.raises(StreamError, match=rf"record '{failing.fails}' of .*, line 1: cannot be encoded: .*a bug"):
        steps_of(ahead, 0, 100)
    with pytest.raises(StreamError):  # it does not go on as if nothing had been
        ahead.batches(ahead.steps)
    ahead.close()
    plain = Ahead(stream(folder))
    plain.batches(0)
    with pytest.raises(ValueError, match="step: expected 1, the next; got 5"):
        plain.batches(5)
    plain.close()


def test_other_data_or_settings_are_refused(folder):
    one = stream(folder)
    state = one.state_dict()
    with pytest.raises(DataError, match=r"another capacity \(160 there, 320 now\)"):
        stream(folder, capacity=320).load_state_dict(state)
    with pytest.raises(DataError, match=r"another records \(70 there, 20 now\), bytes"):
        stream(folder / "table.parquet").load_state_dict(state)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_changed_contents_are_refused(tmp_path, suffix):
    """Though nothing else of the file differs: its size, its records, its times."""
    path = tmp_path / f"a{suffix}"
    records = draw_records(random(8), [], 40)
    write_records(records, path)
    one = stream(tmp_path)
    one.batches(0)
    state, times = json.loads(json.dumps(one.state_dict())), path.stat()
    moved = path.rename(tmp_path / f"b{suffix}")
    stream(tmp_path).load_state_dict(state)  # another name is no other data
    moved.rename(path)
    if suffix == ".jsonl":
        path.write_bytes(path.read_bytes()[::-1].replace(b"}", b"]", 1)[::-1])
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    with pytest.raises(
        DataError, match=r"^the stream cannot go on where it was, as it has another file contents \(\w+ there"
    ):
        stream(tmp_path).load_state_dict(state)


def test_what_it_refuses(folder, tmp_path):
    for options, problem in (
        ({"too_long": "cut"}, "too_long: expected turns, drop or error"),
        ({"on_bad": "skip"}, "on_bad: expected quarantine or error"),
        ({"workers": 0}, "workers: expected 1 or more"),
        ({"ranks": 3}, "rows: expected a multiple of 3 ranks"),
    ):
        with pytest.raises(ValueError, match=problem):
            stream(folder, **options)
    for name in ("depth", "threads"):
        with pytest.raises(ValueError, match=f"{name}: expected 1 or more; got 0"):
            Ahead(stream(folder), **{name: 0})
    with pytest.raises(RecordError, match="no such file"):
        stream(tmp_path / "none")
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DataError, match="expected at least one record"):
        stream(tmp_path / "a.jsonl")


def test_an_index_reads_any_record(folder, tmp_path):
    index = RecordIndex(folder)
    records = list(read_records(folder))
    assert len(index) == len(records)
    for place in random(5).permutation(len(records)):
        assert index[int(place)] == records[place]
    assert index.where(len(records) - 1) == Where(str(folder / "table.parquet"), 20)
    with pytest.raises(IndexError):
        index[len(records)]
    order = index.order(random(6))
    assert sorted(order.tolist()) == list(range(len(records)))
    index.close()
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(records[0].to_line().encode() + b"\n\n")
        file.seek(100 * 2**20, os.SEEK_CUR)
        file.write(b"\n" + records[1].to_line().encode())
    index = RecordIndex(path, limit=2**20)
    assert [index[place] for place in (0, 1, 3)] == [records[0], None, records[1]]
    with pytest.raises(RecordError, match=r"100\.0 MiB; at most 1\.0 MiB"):
        index[2]


def test_an_order_reads_neighbours_together(tmp_path, monkeypatch):
    from m4ov.data import index as module

    monkeypatch.setattr(module, "_BLOCK", 10)
    write_records([Record(str(n), [user("a"), assistant("b")]) for n in range(995)], tmp_path / "a.jsonl")
    index = RecordIndex(tmp_path)
    orders = [index.order(np.random.default_rng(seed)) for seed in range(2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(995))
        for begin in range(0, 880, 80):
            assert len({int(place) // 10 for place in order[begin : begin + 70]}) <= 16
    assert orders[0].tolist() != orders[1].tolist()


class Stopping(Ahead):
    """Ctrl-C at a step."""

    stop = -1

    def batches(self, step):
        if step == self.stop:
            signal.raise_signal(signal.SIGINT)
        return super().batches(step)


def test_the_loop_trains_on_it_and_goes_on(folder, tmp_path):
    """A real model under the loop, stopped after three steps: the same weights as without a pause, to the bit."""
    sizes = ModelConfig(
        vision=VisionConfig(
            patch_size=4, hidden_size=32, intermediate_size=64, layers=1, heads=2, deepstack_layers=[0]
        ),
        text=TextConfig(hidden_size=32, intermediate_size=64, layers=1, heads=4, key_value_heads=2, head_dim=16),
    )
    config = Config.from_dict(qwen3_vl_config(sizes, tokenizer(), grid=8).to_dict())
    options = TrainConfig(steps=4, precision="fp32", checkpoint_seconds=0.0, log_every=1)

    def run(folder_of_run, stop: int = -1):
        data = Stopping(stream(folder, rows=2))
        data.stop = stop
        model = new(config, seed=1, dtype=torch.float32)
        try:
            return train(
                model, data, loss_of, config=options, optim=OptimConfig(), folder=folder_of_run, console=quiet()
            )
        finally:
            data.close()

    straight = run(tmp_path / "straight")
    with pytest.raises(Interrupted):
        run(tmp_path / "paused", stop=2)
    paused = run(tmp_path / "paused")
    assert paused.resumed_at == 3
    assert paused.tokens == straight.tokens > 0
    assert equal_states(paused.weights, straight.weights)
    rows = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "data_wait_seconds" in row]) == 4


def test_waiting_is_reported(folder):
    class Slow:
        def batches(self, step):
            time.sleep(0.05)
            return []

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    ahead = Ahead(Slow(), depth=1)
    for step in range(3):
        ahead.batches(step)
    assert ahead.waited > 0
    assert ahead.steps == 3
    ahead.close()

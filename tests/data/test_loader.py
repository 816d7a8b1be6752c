"""The packing loader: every sample once an epoch, full rows, the same steps on any number of ranks, also later on."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from m4ov.data import PackedLoader

RANDOM = np.random.default_rng(int(os.environ["M4OV_TEST_SEED"]))


def loader(lengths, *, rows=4, rank=0, ranks=1, capacity=64, **options):
    return PackedLoader(lengths, list, capacity=capacity, rows=rows, seed=7, rank=rank, ranks=ranks, **options)


def drawn(count: int = 200, capacity: int = 64) -> list[int]:
    return RANDOM.integers(1, capacity + 1, count).tolist()


def test_every_sample_comes_once_an_epoch_and_rows_are_full():
    lengths = drawn(capacity=32)
    one = loader(lengths)
    seen: list = []
    filled = 0
    for step in range(120):
        batches = one.batches(step)
        assert len(batches) == 4
        for row in batches:
            assert sum(lengths[index] for _, index in row) <= 64
            filled += sum(lengths[index] for _, index in row)
        seen += [visit for row in batches for visit in row]
    assert len(set(seen)) == len(seen)
    whole = min(epoch for epoch, _ in one.waiting)  # epochs of which nobody waits any more
    assert whole >= 5
    for epoch in range(whole):
        assert sorted(index for found, index in seen if found == epoch) == list(range(len(lengths)))
    assert filled >= 0.95 * 120 * 4 * 64
    orders = [[index for found, index in seen if found == epoch] for epoch in range(2)]
    assert orders[0] != orders[1]


def test_no_sample_waits_for_ever():
    """One that fits nowhere well, among many that fill a row by themselves."""
    one = loader([64] * 50 + [33], window=1.0)
    for step in range(40):
        one.batches(step)
        oldest = min(epoch for epoch, _ in one.waiting) if one.waiting else one.read // 51
        assert one.read // 51 - oldest <= 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_steps_of_one(ranks):
    lengths = drawn()
    one, many = loader(lengths), [loader(lengths, rank=rank, ranks=ranks) for rank in range(ranks)]
    for step in range(12):
        rows = one.batches(step)
        parts = [part.batches(step) for part in many]
        assert [len(part) for part in parts] == [4 // ranks] * ranks
        assert sorted(row for part in parts for row in part) == sorted(rows)
    assert all(part.state_dict() == one.state_dict() for part in many)


def test_it_goes_on_on_another_number_of_ranks():
    lengths = drawn()
    one, first = loader(lengths), loader(lengths, rank=1, ranks=2)
    for step in range(5):
        one.batches(step)
        first.batches(step)
    state = json.loads(json.dumps(first.state_dict()))  # as a checkpoint keeps it
    others = [loader(lengths, rank=rank, ranks=4) for rank in range(4)]
    for other in others:
        other.load_state_dict(state)
    for step in range(5, 12):
        assert sorted(row for other in others for row in other.batches(step)) == sorted(one.batches(step))


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"lengths: expected samples of 1 to 64 tokens; got lengths\[1\] = 65"):
        loader([3, 65])
    with pytest.raises(ValueError, match="no sample"):
        loader([])
    with pytest.raises(ValueError, match=r"rows: expected a multiple of 3 ranks, such as \[3, 6\]; got 4"):
        loader([3], ranks=3)
    with pytest.raises(ValueError, match=r"rows: expected a multiple of 8 ranks, such as \[8\]; got 4"):
        loader([3], ranks=8)
    with pytest.raises(ValueError, match="window: expected 1 or greater"):
        loader([3], window=0.5)
    one = loader([3, 4, 5])
    one.batches(0)
    with pytest.raises(ValueError, match="step: expected 1, the next; got 0"):
        one.batches(0)

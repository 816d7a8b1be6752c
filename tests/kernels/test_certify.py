"""The certificate, held against NumPy's formulas on each sequence by itself."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from m4ov_kernels.numerics import CLASSES, QUANTILES, certify


def draw(tokens, noise=0.3, dtype=torch.float32):
    rollout = -torch.rand(tokens) * 4
    return rollout.to(dtype), (rollout + noise * torch.randn(tokens)).clamp(max=0.0).to(dtype)


def expected(group, delta, low=0.2, high=0.28):
    """``group`` is of these differences, by NumPy."""
    assert group.tokens == len(delta)
    assert group.identical == np.count_nonzero(delta == 0)
    if not len(delta):
        assert all(math.isnan(value) for value in (group.max_abs, group.mean_abs, group.k3, *group.quantiles))
        return
    ratio = np.exp(delta)
    found = (group.max_abs, group.mean_abs, group.mean, group.k3, group.clipped_low, group.clipped_high)
    formulas = (
        np.abs(delta).max(),
        np.abs(delta).mean(),
        delta.mean(),
        np.mean(ratio - 1 - np.log(ratio)),
        np.mean(ratio < 1 - low),
        np.mean(ratio > 1 + high),
    )
    np.testing.assert_allclose(found, formulas, rtol=1e-12, atol=1e-15)
    quantiles = np.quantile(ratio, QUANTILES, method="inverted_cdf")
    np.testing.assert_allclose(group.quantiles, quantiles, rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_packed_against_numpy(dtype):
    lengths = [5, 0, 17, 1, 30]
    rollout, train = draw(sum(lengths), dtype=dtype)
    train[::7] = rollout[::7]
    types = torch.randint(3, rollout.shape) * (torch.rand(rollout.shape) < 0.1)
    mask = torch.rand(rollout.shape) < 0.6
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    found = certify(rollout, train, mask=mask, cu_seqlens=cu_seqlens, token_types=types, position_bins=[0, 3, 10])

    delta = train.double().numpy() - rollout.double().numpy()
    names, positions, kept = [], [], mask.numpy()
    for first, length in zip(cu_seqlens.tolist(), lengths, strict=False):  # one sequence and token after the other
        last, count = 0, 0
        for place in range(first, first + length):
            kind = int(types[place])
            names.append(CLASSES[3] if kind else CLASSES[last])
            last = kind or last
            positions.append(count)
            count += int(mask[place])
    names, positions = np.array(names), np.array(positions)
    expected(found.total, delta[kept])
    assert [group.name for group in found.classes] == list(CLASSES)
    for group in found.classes:
        expected(group, delta[kept & (names == group.name)])
    assert [group.span for group in found.positions] == [(0, 2), (3, 9), (10, None)]
    for group in found.positions:
        first, last = group.span
        expected(group, delta[kept & (positions >= first) & (positions <= (last if last is not None else 1e9))])
    assert sum(group.tokens for group in found.positions) == sum(g.tokens for g in found.classes) == kept.sum()
    worst = np.argmax(np.where(kept, np.abs(delta), -1))
    assert int(cu_seqlens[found.worst.sequence]) + found.worst.place == worst
    assert (found.worst.rollout, found.worst.train) == (float(rollout[worst]), float(train[worst]))
    assert not found.identical


def test_padded_is_packed():
    """Left- or right-padded rows and packed ones have the same certificate, up to where the tokens lie."""
    lengths = [4, 9, 2]
    rollout, train = draw(sum(lengths))
    types = (torch.rand(rollout.shape) < 0.2).int()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    packed = certify(rollout, train, cu_seqlens=cu_seqlens, token_types=types, position_bins=3)
    for left in (False, True):
        shape = (len(lengths), 9)
        padded = [torch.full(shape, math.nan), torch.full(shape, math.nan), torch.zeros(shape).int()]
        mask = torch.zeros(shape, dtype=torch.bool)
        for row, (first, length) in enumerate(zip(cu_seqlens.tolist(), lengths, strict=False)):
            place = slice(9 - length, 9) if left else slice(length)
            mask[row, place] = True
            for whole, part in zip(padded, (rollout, train, types), strict=True):
                whole[row, place] = part[first : first + length]
        found = certify(padded[0], padded[1], mask=mask, token_types=padded[2], position_bins=3)
        assert (found.total, found.positions, found.classes) == (packed.total, packed.positions, packed.classes)
        assert found.sequences == 3


def test_position_bins_cover_the_longest_sequence():
    rollout, train = draw(20)
    found = certify(rollout, train, cu_seqlens=torch.tensor([0, 7, 20]), position_bins=4)
    assert [group.span for group in found.positions] == [(0, 3), (4, 7), (8, 11), (12, 15)]
    assert [group.tokens for group in found.positions] == [8, 7, 4, 1]


def test_identical_says_so():
    values, _ = draw(1234)
    found = certify(values, values.clone().double(), cu_seqlens=torch.tensor([0, 1000, 1234]))
    assert found.identical
    assert found.worst is None
    assert found.text().split("\n")[0] == "identical in all 1,234 tokens of 2 sequences"
    assert (found.total.max_abs, found.total.k3, found.total.quantiles) == (0.0, 0.0, (1.0,) * 5)
    other = values.clone()
    other[3] = torch.nextafter(values[3], torch.tensor(-math.inf))
    found = certify(values, other)
    assert not found.identical
    assert found.total.identical == 1233
    assert found.text().startswith("1 of 1,234 tokens differ")
    assert 0 < found.total.k3 < 1e-12


def test_a_nan_is_named_and_in_no_figure():
    rollout, train = draw(30)
    rollout[[4, 11]] = math.nan
    train[[11, 20]] = math.nan
    mask = torch.ones(30, dtype=torch.int64)
    mask[20] = 0  # does not count
    found = certify(rollout, train, mask=mask)
    assert (found.nan_rollout, found.nan_train, found.total.tokens) == (2, 1, 27)
    assert found.first_nan.place == 4
    kept = [place for place in range(30) if place not in (4, 11, 20)]
    expected(found.total, (train.double() - rollout.double()).numpy()[kept])
    first = found.text().split("\n")[0]
    assert first.startswith("NaN in 2 tokens of rollout and 1 token of training, first in sequence 0, token 4: nan in")
    assert "the other 27" in first
    same = certify(rollout, rollout)
    assert not same.identical
    assert "identical in all 28 tokens" in same.text()
    assert same.text().startswith("NaN in 2 tokens of rollout and 2 tokens of training")


def test_infinities_are_in_the_figures():
    rollout, train = torch.tensor([-1.0, -math.inf, -math.inf, -2.0]), torch.tensor([-1.0, -math.inf, -3.0, -math.inf])
    found = certify(rollout, train)
    assert (found.infinite, found.total.identical, found.total.max_abs, found.total.k3) == (3, 2, math.inf, math.inf)
    assert found.total.quantiles[0] == 0.0
    assert found.total.quantiles[-1] == math.inf
    assert found.worst.place == 2
    assert "3 tokens infinite" in found.text()
    record = found.as_json()
    assert record["total"]["max_abs"] == "inf"
    assert json.loads(json.dumps(record, allow_nan=False)) == record


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (5,)])
def test_nothing_to_compare(shape):
    values = torch.zeros(shape)
    types = torch.zeros(shape, dtype=torch.int64)
    found = certify(values, values, mask=torch.zeros(shape, dtype=torch.bool), token_types=types)
    assert not found.identical
    assert found.text().startswith("no token was compared")
    assert found.sequences == 0
    json.dumps(found.as_json(), allow_nan=False)


def test_json_has_it_all():
    rollout, train = draw(50)
    found = certify(rollout, train, token_types=(torch.arange(50) == 20).int())
    record = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert record["total"]["max_abs"] == found.total.max_abs
    assert [group["tokens"] for group in record["classes"]] == [20, 29, 0, 1]
    assert record["classes"][2]["k3"] is None
    assert record["positions"][0]["span"] == [0, 6]
    assert record["worst"]["place"] == found.worst.place


@pytest.mark.parametrize("case", ["differ", "identical", "infinite", "nothing"])
def test_plot(tmp_path, case):
    rollout, train = draw(40)
    if case == "identical":
        train = rollout
    if case == "infinite":
        train[5] = -math.inf
    mask = torch.zeros(40).int() if case == "nothing" else None
    path = tmp_path / "certificate.svg"
    certify(rollout, train, mask=mask, token_types=(torch.arange(40) == 20).int()).plot(path)
    assert path.read_text().count("<path") > 20


def test_a_text_shows_every_group():
    rollout, train = draw(4000)
    lines = certify(rollout, train, token_types=(torch.arange(4000) == 20).int()).text().split("\n")
    for group in ("all", "position 0 – 499", "position 3,500 – 3,999", *CLASSES):
        assert any(line.startswith(f"{group} ") for line in lines), group
    assert "…" not in "".join(lines)


def test_importing_brings_no_plotting():
    code = "import sys, m4ov_kernels.numerics; print([m for m in ('matplotlib', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


VALUES = torch.full((6,), -1.0)


@pytest.mark.parametrize(
    ("kind", "message", "values", "options"),
    [
        (TypeError, "rollout_logprobs must be a tensor", ([-1.0], VALUES), {}),
        (TypeError, "train_logprobs must be a bfloat16", (VALUES, VALUES.long()), {}),
        (ValueError, "train_logprobs must be [6], as rollout_logprobs; got [2, 3]", (VALUES, VALUES.view(2, 3)), {}),
        (ValueError, "rollout_logprobs must be [T] or [B, T]", (VALUES.view(1, 2, 3), VALUES), {}),
        (ValueError, "rollout_logprobs must be at most 0", (-VALUES, VALUES), {}),
        (ValueError, "train_logprobs must be at most 0", (VALUES, VALUES + 3), {}),
        (ValueError, "mask must be [6]", (VALUES, VALUES), {"mask": torch.ones(5).bool()}),
        (TypeError, "mask must be an int64", (VALUES, VALUES), {"mask": torch.ones(6)}),
        (TypeError, "token_types must be", (VALUES, VALUES), {"token_types": torch.ones(6).bool()}),
        (ValueError, "token_types must be 0, 1 or 2; got 5", (VALUES, VALUES), {"token_types": torch.full((6,), 5)}),
        (ValueError, "cu_seqlens must be from 0 to the 6", (VALUES, VALUES), {"cu_seqlens": torch.tensor([0, 3])}),
        (ValueError, "cu_seqlens must be from 0", (VALUES, VALUES), {"cu_seqlens": torch.tensor([0, 4, 3, 6])}),
        (ValueError, "cu_seqlens must be [N + 1]", (VALUES, VALUES), {"cu_seqlens": torch.tensor(6)}),
        (ValueError, "cu_seqlens must be None", (VALUES.view(2, 3),) * 2, {"cu_seqlens": torch.tensor([0, 6])}),
        (ValueError, "position_bins must be at least 1", (VALUES, VALUES), {"position_bins": 0}),
        (ValueError, "position_bins must be ascending from 0", (VALUES, VALUES), {"position_bins": [1, 4]}),
        (TypeError, "position_bins must be an int, or", (VALUES, VALUES), {"position_bins": 2.5}),
        (ValueError, "quantiles must be between 0 and 1", (VALUES, VALUES), {"quantiles": (0.5, 1.5)}),
        (ValueError, "clip_low must be a finite number", (VALUES, VALUES), {"clip_low": -1.0}),
        (TypeError, "clip_high must be a number", (VALUES, VALUES), {"clip_high": "x"}),
    ],
)
def test_refused(kind, message, values, options):
    with pytest.raises(kind) as error:
        certify(*values, **options)
    assert str(error.value).startswith(f"certify: {message}")

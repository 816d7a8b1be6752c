"""Shares of a whole, and what images are allotted by their density."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m4ov.data.density import Allotment, Density, allot
from m4ov.data.density.allot import DENSE_MIX, EMPTY_MIX
from m4ov.data.shares import largest_remainder

SHARES = st.floats(0, 1)
DENSITIES = st.lists(st.tuples(SHARES, SHARES, SHARES, SHARES), min_size=1, max_size=30).map(
    lambda rows: [
        Density.of(dict(zip(("subjects", "spatial", "text", "knowledge"), row, strict=True)), {}) for row in rows
    ]
)


def dense(combined: float, text: float = 0.0) -> Density:
    return Density(combined, combined, text, combined, combined)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=40), st.integers(0, 10_000))
def test_largest_remainders_add_up(weights, total):
    given_out = largest_remainder(weights, total)
    assert given_out.sum() == total
    assert (given_out >= 0).all()
    if any(weights):
        shares = np.array(weights) / max(weights)
        exact = total * shares / shares.sum()
        assert (np.abs(given_out - exact) < 1 + 1e-6).all()
    assert np.array_equal(given_out, largest_remainder(weights, total))


def test_equal_remainders_go_by_order():
    assert largest_remainder([1, 1, 1], 4).tolist() == [2, 1, 1]
    assert largest_remainder([0, 0], 3).tolist() == [2, 1]
    assert largest_remainder([0.1] * 10, 3).tolist() == [1] * 3 + [0] * 7
    assert largest_remainder([], 0).tolist() == []


@pytest.mark.parametrize(
    ("weights", "total"), [([1, -1], 1), ([float("nan")], 1), ([float("inf")], 1), ([], 1), ([1], -1), ([1], 2**41)]
)
def test_shares_of_nothing_are_refused(weights, total):
    with pytest.raises(ValueError, match="must be"):
        largest_remainder(weights, total)


@settings(deadline=None)
@given(DENSITIES, st.integers(0, 3), st.integers(0, 200), st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.booleans())
def test_allotments_add_up_and_follow_density(densities, minimum, more, power, capped):
    total = minimum * len(densities) + more
    maximum = minimum + -(-more // len(densities)) + 1 if capped else None
    found = allot(densities, total, minimum=minimum, maximum=maximum, power=power)
    assert sum(share.questions for share in found) == total
    for share in found:
        assert share.questions >= minimum
        assert maximum is None or share.questions <= maximum
        assert sum(share.difficulties) == share.questions
        assert min(share.difficulties) >= 0
        assert share.max_pixels % 1024 == 0
        assert 1024 <= share.max_pixels <= 1024**2
    assert found == allot(densities, total, minimum=minimum, maximum=maximum, power=power)
    order = sorted(range(len(found)), key=lambda place: densities[place].combined)
    for poor, rich in pairwise(order):
        if power and densities[rich].combined > densities[poor].combined + 1e-3:
            assert found[rich].questions >= found[poor].questions
    if power == 0:
        counts = [share.questions for share in found]
        assert max(counts) - min(counts) <= 1


def test_the_mix_of_the_whole_is_that_of_its_parts():
    random = np.random.default_rng(5)
    densities = [dense(float(value)) for value in random.random(400)]
    found = allot(densities, 400)  # one each: rounding alone would make all of them easy
    mix = sum(np.array(share.difficulties) for share in found)
    expected = sum((1 - d.combined) * np.array(EMPTY_MIX) + d.combined * np.array(DENSE_MIX) for d in densities)
    assert np.abs(mix - expected).max() < 3
    empty, full = allot([dense(0.0)], 1000), allot([dense(1.0)], 1000)
    assert empty[0].difficulties == (700, 250, 50)
    assert full[0].difficulties == (200, 400, 400)


def test_pixels_grow_with_density_and_with_text():
    densities = [dense(0.0), dense(0.5), dense(1.0), dense(0.5, text=1.0)]
    found = allot(densities, 4, min_pixels=4096, max_pixels=4096 * 256, pixel_unit=1024)
    assert [share.max_pixels for share in found] == [4096, 4096 * 16, 4096 * 256, 4096 * 256]
    small = allot(densities, 4, max_pixels=4096, pixel_unit=1024)
    assert [share.max_pixels for share in small] == [1024, 1024, 4096, 4096]
    assert allot([dense(0.3)], 1)[0].to_json()["difficulties"] == {"easy": 1, "medium": 0, "hard": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total": 1}, "total must be 2 to any number for 2 images, got 1"),
        ({"total": 9, "maximum": 4}, "total must be 2 to 8 for 2 images, got 9"),
        ({"total": 4, "minimum": -1}, "minimum"),
        ({"total": 4, "minimum": 3, "maximum": 2}, "minimum"),
        ({"total": 4, "power": float("nan")}, "power must be"),
        ({"total": 4, "min_pixels": 0}, "min_pixels"),
        ({"total": 4, "min_pixels": 9999, "max_pixels": 4096}, "min_pixels"),
        ({"total": 4, "max_pixels": 512}, "pixel_unit"),
    ],
)
def test_what_cannot_be_allotted_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        allot([dense(0.5), dense(0.6)], **arguments)


def test_no_image_gets_nothing():
    assert allot([], 0) == []
    with pytest.raises(ValueError, match="total must be 0 to 0 for 0 images, got 1"):
        allot([], 1)
    assert allot([dense(0.0), dense(0.0)], 3)[0] == Allotment(2, (1, 1, 0), 65536)

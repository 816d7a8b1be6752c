"""The two data sets, their splits, and batches that are a function of seed and step."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest
import torch

from m4ov.data import digits
from tests.tiny_task import mixture_batch, tiny_mixture, tiny_splits


def test_easy_vqa_is_whole():
    (general, _), (held_out, _) = tiny_splits()
    assert (len(general.images), len(general.samples)) == (4000, 38575)
    assert (len(held_out.images), len(held_out.samples)) == (1000, 9673)
    assert len({sample.answer for sample in general.samples}) == 13
    kinds = {
        "what color is the circle?": "colour",
        "what is the blue shape?": "shape",
        "is there a circle?": "yes/no, this shape",
        "is no teal shape present?": "yes/no, not this colour",
        "does the image not contain a rectangle?": "yes/no, not this shape",
    }
    found = {sample.question: sample.kind for sample in general.samples if sample.question in kinds}
    assert found == kinds


@pytest.mark.parametrize("held_out", [1, 100, 360, 1796])
def test_digits_are_split_without_overlap_and_evenly(held_out):
    training, test = digits(16, held_out=held_out, split_seed=3)
    assert len(training.samples) + len(test.samples) == 1797
    assert len(test.samples) == held_out
    whole, _ = digits(16, held_out=1, split_seed=0)
    counts = Counter(sample.answer for sample in test.samples)
    shares = Counter(sample.answer for split in (training, test) for sample in split.samples)
    for digit, count in shares.items():
        assert abs(counts[digit] - count * held_out / 1797) <= 1.0
    assert whole.images.dtype == np.uint8


def test_the_split_depends_on_its_own_seed_only():
    one, again = (digits(16, held_out=360, split_seed=0)[1] for _ in range(2))
    assert np.array_equal(one.images, again.images)
    other = digits(16, held_out=360, split_seed=1)[1]
    assert not np.array_equal(one.images, other.images)


def test_batches_are_a_function_of_seed_and_step():
    first, again = mixture_batch(5), mixture_batch(5)
    assert torch.equal(first.images.pixel_values, again.images.pixel_values)
    assert torch.equal(first.input_ids, again.input_ids)
    other = mixture_batch(6)
    assert not torch.equal(first.images.pixel_values, other.images.pixel_values)
    other_seed = tiny_mixture(1).batch(5)
    assert not torch.equal(first.images.pixel_values, other_seed.images.pixel_values)


def test_every_image_is_visited_once_an_epoch():
    mixture = tiny_mixture(images=7)
    visits: Counter[int] = Counter()
    steps = 2 * 4000 // 7
    for step in range(steps):
        visits.update(mixture._visited(0, 4000, 7 * step, 7).tolist())
    assert set(visits.values()) <= {1, 2}
    assert sum(visits.values()) == steps * 7


def test_each_group_of_questions_has_its_share():
    mixture = tiny_mixture()
    random = np.random.default_rng(int(os.environ["M4OV_TEST_SEED"]))
    kinds: Counter[tuple[bool, bool]] = Counter()
    images = [known for _, known in mixture.pools[0].visits()[:1000]]
    for known in images:
        asked = mixture._asked(known, 2, random)
        assert len(set(asked)) == len(asked) == min(2, len(known))
        kinds.update((sample.kind.endswith("shape"), sample.kind.startswith("yes/no")) for sample in asked)
    assert len(kinds) == 4
    assert min(kinds.values()) > 0.08 * 2 * len(images)
    about_shapes = sum(count for (shape, _), count in kinds.items() if shape)
    assert about_shapes > 0.5 * 2 * len(images)

"""Mixtures over pools: the quickstart's batches as ever, counts that change, and samples of every kind of pool."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch

from m4ov.data import Mixture, Pool, Sample, Split
from tests.tiny_task import tiny_mixture, tiny_task


def digest(batch) -> str:
    """Of questions, answers and pixels, whatever the tokens' numbers are."""
    encoder = tiny_task().encoder
    found = hashlib.sha256()
    for place in range(len(batch)):
        one = batch[place]
        found.update(encoder.tokenizer.decode(one.input_ids.tolist(), skip_special_tokens=True).encode())
        pixels = (one.images.pixel_values.float().numpy() * 127.5 + 127.5).round().astype(np.uint8)
        found.update(pixels.tobytes())
    return found.hexdigest()[:16]


def test_the_quickstarts_batches_are_what_they_were():
    """What the README's figures were trained on."""
    found = {step: digest(tiny_mixture(images=48, digits=12).batch(step)) for step in (0, 83, 300, 899)}
    assert found == GOLDEN
    assert tiny_mixture(images=48, digits=12).state_dict() == {}


GOLDEN = {0: "6cdb8c1bb67562c3", 83: "ce310beff43b80d6", 300: "65ddf90bc8a7531c", 899: "978d903b1212c3b5"}


def pool(name: str, images: int, questions: int = 1, **options) -> Pool:
    """Images of one grey level each; the question says which image, and which of its questions it is."""
    pixels = np.zeros((images, 64, 64, 3), np.uint8) + np.arange(images, dtype=np.uint8)[:, None, None, None]
    samples = [
        Sample(image, f"{name} {image} {number}", "yes", "colour")
        for image in range(images)
        for number in range(questions)
    ]
    return Pool(name, Split(name, pixels, tuple(samples)), **options)


def mixture(pools, counts, **options) -> Mixture:
    return Mixture(pools, counts, tiny_task().encoder, **{"seed": 0, "dtype": torch.float32, **options})


def asked(batch) -> list[tuple[str, str]]:
    """(pool, image) of each sample, and that it has the pixels of that image."""
    encoder, found = tiny_task().encoder, []
    for place in range(len(batch)):
        one = batch[place]
        text = encoder.tokenizer.decode(one.input_ids.tolist(), skip_special_tokens=True)
        name, image, _ = text.removesuffix("yes").split()
        level = (one.images.pixel_values * 127.5 + 127.5).round()
        assert (level == int(image)).all()
        found.append((name, image))
    return found


def test_every_pool_has_its_count_and_its_epochs():
    pools = [pool("a", 10), pool("b", 7), pool("c", 5, questions=3)]
    found = mixture(pools, {"a": 4, "b": 2, "c": 1})
    visits = [asked(found.batch(step)) for step in range(35)]
    for step in visits:
        assert Counter(name for name, _ in step) == {"a": 4, "b": 2, "c": 1}
    for name, images, count in (("a", 10, 4), ("b", 7, 2), ("c", 5, 1)):
        seen = Counter(image for step in visits for of, image in step if of == name)
        assert set(seen.values()) == {35 * count // images}  # whole epochs


def test_a_pool_by_sample_sees_an_image_as_often_as_it_has_questions():
    split = Split(
        "p",
        np.zeros((3, 64, 64, 3), np.uint8),
        tuple(Sample(min(n, 2), f"p {min(n, 2)} {n}", "yes", "") for n in range(9)),
    )
    split.images[:] = np.arange(3, dtype=np.uint8)[:, None, None, None]
    found = mixture([Pool("p", split, by_sample=True)], {"p": 3})
    seen = Counter(image for step in range(3) for _, image in asked(found.batch(step)))
    assert seen == {"0": 1, "1": 1, "2": 7}


def test_counts_change_between_steps_and_orders_go_on():
    pools = [pool("a", 10), pool("b", 7)]
    whole = mixture(pools, {"a": 4, "b": 2})
    visits = [asked(whole.batch(step)) for step in range(3)]
    whole.change(3, {"a": 1, "b": 5})
    visits += [asked(whole.batch(step)) for step in range(3, 6)]
    assert [Counter(name for name, _ in step)["b"] for step in visits] == [2, 2, 2, 5, 5, 5]
    for name, images in (("a", 10), ("b", 7)):
        order = [image for step in visits for of, image in step if of == name]
        for begin in range(0, len(order) - images + 1, images):
            assert len(set(order[begin : begin + images])) == images  # no image twice in an epoch
    resumed = mixture(pools, {"a": 4, "b": 2})
    resumed.load_state_dict(whole.state_dict())
    for step in (3, 5, 9):
        one, other = whole.batch(step), resumed.batch(step)
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.images.pixel_values, other.images.pixel_values)
    early = mixture(pools, {"a": 4, "b": 2})
    early.change(0, {"a": 1, "b": 5})
    assert early.state_dict()["counts"] == {"a": 1, "b": 5}


def test_shares_of_a_step_of_many_pools_are_its_samples():
    pools = [pool("a", 9, flip=True), pool("b", 9, questions=2), pool("c", 9, shift=3)]
    whole = mixture(pools, {"a": 3, "b": 0, "c": 4})
    for shares in (2, 3, 7):
        parts = [whole.batch(1, share, shares) for share in range(shares)]
        assert sorted(sample for part in parts for sample in asked(part)) == sorted(asked(whole.batch(1)))


def test_an_image_that_is_asked_about_its_sides_is_not_mirrored():
    """Dark on the left, light on the right, each image its own; half of those that may be are mirrored."""
    pixels = np.zeros((20, 64, 64, 3), np.uint8)
    pixels[:, :, 32:] = 200
    texts = {0: "is it in the left or the right half?", 1: "is it bright?"}
    samples = [Sample(image, texts[image % 2], "yes", "region") for image in range(20)]
    found = mixture([Pool("p", Split("p", pixels, tuple(samples)), flip=True)], {"p": 20})
    mirrored: Counter[bool] = Counter()
    for step in range(5):
        batch = found.batch(step)
        for place in range(len(batch)):
            one = batch[place]
            text = tiny_task().encoder.tokenizer.decode(one.input_ids.tolist(), skip_special_tokens=True)
            flipped = bool(one.images.pixel_values[0, 0] > 0)  # its first pixel
            if "left" in text:
                assert not flipped
            else:
                mirrored[flipped] += 1
    assert mirrored[True] > 10 < mirrored[False]


def test_what_is_wrong_with_a_mixture_is_named():
    pools = [pool("a", 3), pool("b", 3)]
    for counts in ({"a": 3}, {"a": 3, "b": -1}, {"a": 3, "b": 1, "c": 1}):
        with pytest.raises(ValueError, match="counts: expected visits of each of a, b; got"):
            mixture(pools, counts)
    with pytest.raises(
        ValueError, match=r"a step has 1 \+ 2 images \(of a, b\), which is fewer than 2 ranks x 2 parts"
    ):
        mixture(pools, {"a": 1, "b": 2}, ranks=2, accumulate=2)
    empty = Pool("none", Split("none", np.zeros((0, 64, 64, 3), np.uint8), ()))
    with pytest.raises(ValueError, match="pool none: expected samples, got none"):
        mixture([empty], {"none": 1})

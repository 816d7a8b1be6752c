"""The masked twin: which patches change, that only they do, and the loss against logits that are whole, in float64."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from m4ov.data.images import MEAN, STD
from m4ov.rl.perception import mask_patches, masked_units, perception, twin
from m4ov.rl_recipe import PerceptionConfig
from tests.rl import small

SEED = int(os.environ["M4OV_TEST_SEED"])


def patch_of(height, width, grid):
    """Where a pixel's patch is among the rows of ``pixel_values``: block by block, row by row inside a block."""
    row, column = height // 4, width // 4
    block = (row // 2) * (grid[2] // 2) + column // 2
    return 4 * block + 2 * (row % 2) + column % 2


@pytest.mark.parametrize("unit", ["feature", "patch"])
def test_the_mask_lies_on_patches_as_pack_patches_lays_them_out(unit):
    """Blackening the picture before it is cut gives the rows that the mask gives."""
    random = np.random.default_rng(SEED)
    pixels = random.integers(0, 256, (16, 24, 3), dtype=np.uint8)
    grid = (1, 4, 6)
    mask = masked_units(grid, 2, 0.5, SEED % 1000, unit)
    black = pixels.copy()
    for height in range(16):
        for width in range(24):
            if mask[patch_of(height, width, grid)]:
                black[height, width] = 0

    class Picture:
        """A source of given pixels, for small.image."""

        def integers(self, *_, **__):
            return self.pixels

    plain, blackened = Picture(), Picture()
    plain.pixels, blackened.pixels = pixels, black
    samples = [small.prompt(random, (small.image(picture),)) for picture in (plain, blackened)]
    before, after = (small.packed([sample], [2], np.random.default_rng(1)).images for sample in samples)
    ours = mask_patches(before, share=0.5, seeds=[SEED % 1000], unit=unit)
    assert torch.equal(ours.pixel_values, after.pixel_values)
    changed = (ours.pixel_values != before.pixel_values).any(1)
    assert torch.equal(changed, mask)  # these, and no others
    assert torch.equal(ours.pixel_values[mask], torch.full_like(ours.pixel_values[mask], -1.0))
    assert int(mask.sum()) == 12
    if unit == "feature":
        assert (mask.view(-1, 4).all(1) | ~mask.view(-1, 4).any(1)).all()


def test_which_units_are_masked_follows_from_the_seed_alone():
    for unit, count in (("feature", 25), ("patch", 100)):
        masks = [masked_units((1, 10, 10), 2, 0.6, seed, unit) for seed in range(40)]
        each = 100 // count
        assert {int(mask.sum()) for mask in masks} == {round(0.6 * count) * each}
        assert torch.equal(masks[3], masked_units((1, 10, 10), 2, 0.6, 3, unit))
        assert len({tuple(mask.tolist()) for mask in masks}) == 40
        often = torch.stack(masks).double().mean(0)  # 40 draws of 0.6: none always, none never
        assert often.min() > 0.1  # every unit now and then
        assert often.max() < 1.0
    assert masked_units((2, 2, 2), 2, 0.01, 0, "feature").sum() == 4  # one unit at least
    assert masked_units((1, 2, 2), 2, 1.0, 0, "patch").all()


def test_black_is_black_in_every_channel():
    pack = small.batch(SEED)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    found = mask_patches(pack.images, share=1.0, seeds=[0] * 3, mean=mean, std=std).pixel_values
    expected = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).repeat_interleave(32)
    assert torch.equal(found, expected.expand_as(found))
    assert [-m / s for m, s in zip(MEAN, STD, strict=True)] == [-1, -1, -1]
    with pytest.raises(ValueError, match="seeds: expected 3, one for each image; got 1"):
        mask_patches(pack.images, seeds=[0])
    with pytest.raises(ValueError, match="mean, std: expected one for each channel"):
        mask_patches(pack.images, seeds=[0] * 3, mean=(0.5,) * 5, std=(0.5,) * 5)
    with pytest.raises(ValueError, match="unit: expected feature or patch"):
        masked_units((1, 2, 2), 2, 0.5, 0, "pixel")


def test_a_twin_shows_every_image_once_and_once_masked():
    """Samples without an image have no twin; prompts and images are not among the rows that count."""
    pack = small.batch(SEED)
    both = twin(pack, PerceptionConfig(weight=1.0), seeds=[1, 2, 3])
    assert len(both.batch) == 5 + 4
    assert len(both.batch.images.grids) == 3 + 3
    assert both.count == pack.num_labels == 14
    assert both.masked_lengths == (4, 1, 0, 3)
    assert both.responses.lengths == (4, 1, 6, 0, 3, 4, 1, 0, 3)
    rows, targets = both.responses.rows, both.responses.targets
    assert torch.equal(both.of_seen(targets[:14]), targets[14:])
    assert torch.equal(both.batch.input_ids[rows + 1], targets)
    assert (both.batch.mm_token_type_ids[rows + 1] == 0).all()
    assert (both.batch.labels[rows + 1] != -100).all()
    first, second = pack.images, both.batch.images
    assert torch.equal(second.pixel_values[: len(first.pixel_values)], first.pixel_values)
    masked = mask_patches(first, seeds=[1, 2, 3]).pixel_values
    assert torch.equal(second.pixel_values[len(first.pixel_values) :], masked)
    random = np.random.default_rng(SEED)
    assert twin(small.packed([small.prompt(random)], [3], random), PerceptionConfig(weight=1.0), []) is None


def test_one_row_is_two_forwards():
    """Vision tower and language model see both halves in one row, and compute what they would alone."""
    policy, pack = small.model(), small.batch(SEED)
    both = twin(pack, PerceptionConfig(weight=1.0), seeds=[1, 2, 3])
    calls = []
    handles = [part.register_forward_hook(lambda *_: calls.append(1)) for part in (policy.model.visual, policy.model)]
    hidden = policy(both.batch).hidden_states
    assert len(calls) == 2
    for handle in handles:
        handle.remove()
    masked = replace(pack, images=mask_patches(pack.images, seeds=[1, 2, 3]))
    torch.testing.assert_close(hidden[: pack.tokens], policy(pack).hidden_states, rtol=1e-9, atol=1e-9)
    seen = masked[[0, 1, 3, 4]]
    torch.testing.assert_close(hidden[pack.tokens :], policy(seen).hidden_states, rtol=1e-9, atol=1e-9)
    assert (hidden[both.responses.rows[:4]] - hidden[both.responses.rows[14:18]]).abs().max() > 1e-3  # it does change


def written_out(policy, pack, config, seeds, temperature):
    """By whole logits, sample by sample: the terms of each token."""
    masked_pack = replace(pack, images=mask_patches(pack.images, share=config.share, seeds=seeds, unit=config.unit))
    plain = small.log_probabilities(policy, pack, temperature)
    masked = small.log_probabilities(policy, masked_pack, temperature)
    total = torch.zeros((), dtype=torch.float64)
    kls, entropies = [], []
    for sample, words in enumerate(small.chosen(pack)):
        if not pack.images.shown[sample]:
            continue
        for place, word in enumerate(words):
            p, q = plain[sample][place], masked[sample][place]
            inner = q if config.through == "both" else q.detach()
            if config.kl == "exact":
                kl = sum(p[w].exp() * (p[w] - inner[w]) for w in range(len(p)))
            else:
                d = inner[word] - p[word]
                kl = torch.exp(d) - d - 1
            kls.append(kl.detach())
            if config.cap and kl.detach() > config.cap:
                kl = kl.detach() * 0 + config.cap
            entropy, masked_entropy = -(p.exp() * p).sum(), -(q.exp() * q).sum()
            entropies.append((entropy.detach(), masked_entropy.detach()))
            total = total - config.weight * kl + config.entropy * entropy + config.masked_entropy * masked_entropy
    return total, torch.stack(kls), entropies


@pytest.mark.parametrize("kl", ["sampled", "exact"])
@pytest.mark.parametrize("through", ["both", "original"])
@pytest.mark.parametrize("guards", [{}, {"entropy": 0.03, "masked_entropy": 0.02}, {"cap": 1.0, "masked_entropy": 0.1}])
def test_against_whole_logits(kl, through, guards):
    policy, pack, seeds = small.worlds_apart()[0], small.batch(SEED), [4, 5, 6]
    config = PerceptionConfig(weight=0.7, kl=kl, through=through, **guards)
    temperature = 1.3
    if "cap" in guards:  # half of the tokens beyond it
        _, uncapped, _ = written_out(policy, pack, replace(config, cap=0.0), seeds, temperature)
        config = replace(config, cap=uncapped.median().item() * 1.001)
    both = twin(pack, config, seeds)
    hidden = policy(both.batch).hidden_states
    rows = both.responses.rows
    found = perception(
        policy.lm_head,
        both.of_seen(hidden[rows[: both.count]]),
        hidden[rows[both.count :]],
        both.of_seen(both.responses.targets[: both.count]),
        config,
        temperature=temperature,
    )
    expected, kls, entropies = written_out(policy, pack, config, seeds, temperature)
    assert kls.max() > 0.01
    torch.testing.assert_close(found.loss.sum(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.kl, kls, rtol=1e-7, atol=1e-9)
    if "cap" in guards:
        assert torch.equal(found.capped, kls > config.cap)
        assert found.capped.any()
        assert not found.capped.all()
    if config.entropy:
        torch.testing.assert_close(found.entropy, torch.stack([e for e, _ in entropies]))
    small.assert_same(small.gradients(policy, found.loss.sum()), small.gradients(policy, expected))


def test_what_masks_nothing_is_no_divergence():
    """The same image twice: exactly 0, sampled and exact, with a gradient of exactly 0."""
    policy, pack = small.model(), small.batch(SEED)
    hidden = policy(pack).hidden_states[(pack.labels != -100).nonzero()[:, 0] - 1]
    targets = pack.labels[pack.labels != -100]
    for kl in ("sampled", "exact"):
        found = perception(policy.lm_head, hidden, hidden.clone(), targets, PerceptionConfig(weight=1.0, kl=kl))
        assert found.kl.abs().max() < 1e-12
        (gradient,) = torch.autograd.grad(found.loss.sum(), hidden, retain_graph=True)
        assert gradient.abs().max() < 1e-9


def test_a_sampled_estimate_is_the_divergence_on_average():
    """Over words that the policy that sees draws, e^d − d − 1 has the exact divergence as its mean."""
    generator = torch.Generator().manual_seed(SEED)
    head = torch.nn.Linear(8, 11, bias=False, dtype=torch.float64)
    hidden = torch.randn(1, 8, generator=generator, dtype=torch.float64)
    masked = hidden + 0.3 * torch.randn(1, 8, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        chances = (hidden @ head.weight.T).softmax(-1)
        exact = perception(
            head, hidden, masked, torch.zeros(1, dtype=torch.int64), PerceptionConfig(1.0, kl="exact")
        ).kl
        every = torch.arange(11)
        sampled = perception(head, hidden.expand(11, 8), masked.expand(11, 8), every, PerceptionConfig(1.0)).kl
    assert (chances[0] * sampled).sum().item() == pytest.approx(exact.item(), rel=1e-9)


def test_a_sharded_vocabulary_has_no_exact_divergence():
    policy = small.model()
    policy.lm_head.group_name = "tp"
    rows = torch.zeros(2, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"perception\.kl: expected sampled"):
        perception(policy.lm_head, rows, rows, torch.zeros(2, dtype=torch.int64), PerceptionConfig(1.0, kl="exact"))


def test_a_recipe_is_checked():
    for options, message in (
        ({"share": 0.0}, "perception.share: expected more than 0"),
        ({"weight": -1.0}, "perception.weight: expected at least 0"),
        ({"entropy": math.inf}, "perception.entropy"),
        ({"unit": "pixel"}, "perception.unit: expected feature or patch"),
        ({"kl": "k3"}, "perception.kl: expected sampled or exact"),
    ):
        with pytest.raises(ValueError, match=message):
            PerceptionConfig(**options)

"""DPO and MPO of a whole model against their definitions by whole logits, in float64; pairs of records; MPO's δ."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from m4ov.data import PLAIN, ChatEncoder, PixelOptions, Record, RecordError, train_tokenizer
from m4ov.data.records import assistant, user
from m4ov.rl.offline import PairBatch, PreferenceLoss, pairs_of
from m4ov.rl.reference import Reference
from m4ov.rl.responses import Responses, response_logprob
from m4ov.rl_recipe import AlgorithmConfig, ReferenceConfig
from tests.kernels import losses_plain as plain
from tests.rl import small

SEED = int(os.environ["M4OV_TEST_SEED"])
HELD = ReferenceConfig("frozen")


def pairs(seed=SEED):
    """Three, of different lengths, over two images; of the last nothing counts."""
    random = np.random.default_rng(seed)
    images = [small.image(random), small.image(random, 8, 16)]
    prompts = [small.prompt(random, (images[0],)), small.prompt(random, (images[1],)), small.prompt(random)]
    prompts = [prompt for prompt in prompts for _ in range(2)]
    return PairBatch(small.packed(prompts, [4, 2, 1, 5, 0, 0], random))


def loss_of(name, **options):
    policy, before = small.worlds_apart()
    config = AlgorithmConfig(name=name, beta=0.7, reference=HELD, **options)
    return policy, before, PreferenceLoss(config, Reference(HELD, before))


def defined(policy, before, batch, weights, delta=0.0, label_smoothing=0.0, temperature=1.0):
    words = small.chosen(batch.packed)
    lengths = [len(each) for each in words]
    rows = {}
    for name, each in (("logprob", policy), ("ref_logprob", before)):
        found = small.log_probabilities(each, batch.packed, temperature)
        rows[name] = torch.cat([p.gather(1, w[:, None])[:, 0] for p, w in zip(found, words, strict=True)])
    rows["ref_logprob"] = rows["ref_logprob"].detach()
    padded = {name: plain.padded(value, lengths) for name, value in rows.items()}
    keep = plain.padded(torch.ones(sum(lengths), dtype=torch.bool), lengths)
    return plain.preference(padded, keep, 1.0, 0.7, weights, delta, label_smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["dpo", "mpo"])
def test_against_the_definition(name, smoothing):
    policy, before, loss = loss_of(name, label_smoothing=smoothing, temperature=1.2)
    loss.mean = loss.mean.update(0.6, 2)
    found, count = loss(policy, pairs())
    weights = (1.0, 0.0, 0.0) if name == "dpo" else (0.8, 0.2, 1.0)
    expected = defined(policy, before, pairs(), weights, 0.3, smoothing, 1.2)
    assert count == 2  # a pair of which nothing counts is none
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    small.assert_same(small.gradients(policy, found), small.gradients(policy, expected))
    metrics = loss.window.close()
    assert metrics["loss"] == pytest.approx(expected.item() / 2, rel=1e-5)
    assert metrics["pairs"] == 2


def test_weights_of_preference_quality_and_generation():
    for place, name in enumerate(("preference_weight", "quality_weight", "generation_weight")):
        options = dict.fromkeys(("preference_weight", "quality_weight", "generation_weight"), 0.0) | {name: 1.5}
        policy, before, loss = loss_of("mpo", **options)
        weights = tuple(1.5 * (place == other) for other in range(3))
        torch.testing.assert_close(loss(policy, pairs())[0], defined(policy, before, pairs(), weights))


def test_delta_is_one_number_a_step_and_moves_between_steps():
    """Micro-batches of a step share it, so that they add up to one batch; then it is the mean of all rewards."""
    policy, before, loss = loss_of("mpo", delta_decay=0.5)
    batch = pairs()
    whole, count = loss(policy, batch)
    loss.after_step()
    first = loss.mean.delta.item()
    with torch.no_grad():
        reward = 0.7 * (response_logprob(policy, batch.packed) - response_logprob(before, batch.packed))
    bounds = Responses.of(batch.packed).cu_seqlens.tolist()
    rewards = [reward[a:b].sum().item() for a, b in pairwise(bounds[:5])]
    assert len(rewards) == 4
    assert first == pytest.approx(sum(rewards) / 4, rel=1e-5)

    again = loss_of("mpo", delta_decay=0.5)[2]
    parts = [again(policy, PairBatch(batch.packed[2 * pair : 2 * pair + 2])) for pair in range(3)]
    torch.testing.assert_close(sum(part for part, _ in parts), whole, rtol=1e-9, atol=1e-9)
    assert sum(pairs_in for _, pairs_in in parts) == count
    again.after_step(lambda what, values, largest=False: [2 * value for value in values])  # a second rank like this one
    assert again.mean.delta.item() == pytest.approx(first, rel=1e-5)
    assert again.state_dict()["count"] == 8

    resumed = loss_of("mpo", delta_decay=0.5)[2]
    resumed.load_state_dict(loss.state_dict())
    loss(policy, pairs(SEED + 1))
    resumed(policy, pairs(SEED + 1))
    loss.after_step()
    resumed.after_step()
    assert loss.state_dict() == resumed.state_dict()
    assert loss.state_dict()["count"] == pytest.approx(0.5 * 4 + 4)


def test_pairs_of_a_record():
    words = ["how many cats?", "two cats", "three", "many", "sure?", "yes, two"]
    tokenizer = train_tokenizer(words, 320)
    pixels = PixelOptions(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
    encoder = ChatEncoder(tokenizer, pixels, PLAIN)
    turns = [user("how many cats?"), assistant("two cats"), user("sure?"), assistant("yes, two")]
    record = Record("a", turns, rejected=("three", "many"))
    found = pairs_of(record, encoder, Path(), max_length=100)
    assert len(found) == 2

    def said(conversation):
        return tokenizer.decode([token for token in conversation.labels if token != -100])

    assert [said(chosen) for chosen, _ in found] == ["yes, two"] * 2
    assert [said(rejected) for _, rejected in found] == ["three", "many"]
    for chosen, rejected in found:  # the same before, and the end of the turn counts
        shared = next(place for place, label in enumerate(chosen.labels) if label != -100)
        assert chosen.input_ids[:shared] == rejected.input_ids[:shared]
        assert chosen.labels[-1] == rejected.labels[-1] == encoder.end_token
    assert pairs_of(Record("b", turns), encoder, Path(), max_length=100) == []
    with pytest.raises(RecordError, match="expected at most 5 tokens"):
        pairs_of(record, encoder, Path(), max_length=5)


def test_what_is_refused():
    policy = small.model()
    reference = Reference(HELD, policy)
    with pytest.raises(ValueError, match=r"algorithm\.name: expected dpo or mpo"):
        PreferenceLoss(AlgorithmConfig(), reference)
    with pytest.raises(ValueError, match=r"algorithm\.reference\.kind: expected another than none"):
        PreferenceLoss(AlgorithmConfig(name="dpo", reference=HELD), Reference(ReferenceConfig(), policy))
    with pytest.raises(
        ValueError, match="PairBatch: packed: expected a chosen and a rejected answer of each pair; got 5"
    ):
        PairBatch(small.batch(SEED))

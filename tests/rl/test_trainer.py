"""An online run of a small model: it learns, goes on to the same bits from the middle of a rollout, on any number of
ranks; nothing that was drawn is lost or used twice."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from m4ov.generate import Engine, SamplingOptions
from m4ov.parallel import ranks
from m4ov.rl.rewards import Rewards
from m4ov.rl.rollouts import Rollouts
from m4ov.rl.trainer import EngineSampler
from m4ov.rl_recipe import AdvantageConfig, ObjectiveConfig, RLConfig, RolloutConfig
from m4ov.train import TrainingError
from m4ov.train.metrics import read
from tests.rl import online


def rollouts(given, model=None):
    model = model or online.policy()
    sampler = online.Plain(model, given.rollout.samples, given.rollout.max_tokens)
    return Rollouts(model, online.prompts(), sampler, Rewards(given.rewards), given), sampler


@pytest.mark.parametrize("delay", [0, 1])
def test_every_answer_of_a_rollout_is_in_every_pass_once(delay):
    given = online.config(epochs=2, minibatches=2, delay=delay)
    data, sampler = rollouts(given)
    seen = []
    for step in range(8):
        batches = data.batches(step)
        assert all(len(batch.packed) for batch in batches)
        labels = [
            tuple(b.packed[i].labels[b.packed[i].labels != -100].tolist())
            for b in batches
            for i in range(len(b.packed))
        ]
        seen.append(sorted(labels))
        if step % 4 == 0:
            whole = sorted(tuple(tokens) for group in data.ahead[0] for tokens in group.tokens)
        if step % 2:
            assert sorted(seen[-1] + seen[-2]) == whole
    assert len(whole) == 16
    assert seen[0] != seen[2]  # minibatches are drawn anew in each pass
    assert len(sampler.calls) == 2 + delay
    visited = [seed for call in sampler.calls for seed in call]
    assert len(set(visited)) == len(visited)


def test_a_batch_has_what_was_drawn():
    """Old log-probabilities are the trainer's, those of the rollout the sampler's, advantages sum to 0 in a group."""
    given = online.config()
    data, _ = rollouts(given)
    (batch,) = [b for b in data.batches(0) if b.packed.images is not None][:1]
    assert batch.old_logprob.shape == batch.rollout_logprob.shape == (batch.packed.num_labels,)
    torch.testing.assert_close(batch.old_logprob, batch.rollout_logprob, rtol=1e-4, atol=1e-4)
    assert len(batch.image_seeds) == len(batch.packed.images.grids)
    for group in data.ahead[0]:
        assert sum(group.advantages) == pytest.approx(0, abs=1e-5)
    assert data.metrics["mismatch_max_abs"] < 1e-4
    assert data.metrics["pass@1"] <= data.metrics["pass@2"] <= data.metrics["pass@4"]
    assert data.metrics["reward_accuracy"] == pytest.approx(data.metrics["pass@1"])
    again = json.loads(json.dumps(data.state_dict()))
    other, _ = rollouts(given)
    other.load_state_dict(again)
    assert other.state_dict() == data.state_dict()


def test_a_policy_learns_what_is_rewarded(tmp_path):
    given = online.config(prompts=6, samples=6, max_tokens=4)
    online.run(tmp_path, given, steps=8, rate=2e-2, saves=0)
    rows = read(tmp_path / "rl.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    share = [row["pass@1"] for row in rows]
    assert sum(share[-2:]) / 2 > sum(share[:2]) / 2 + 0.3
    assert all(row["ratio_mean"] == pytest.approx(1, abs=1e-4) for row in rows)  # one update a rollout
    assert all(row["perception_kl"] >= 0 for row in rows)
    samples = read(tmp_path / "samples.jsonl")
    assert len(samples) == 8 * given.rollout.shown
    assert samples[0].keys() >= {"step", "question", "text", "correct", "values", "advantage"}


@pytest.mark.parametrize("delay", [0, 1])
def test_a_run_goes_on_to_the_same_bits(tmp_path, delay):
    """Interrupted while the second rollout was learned from, with another in flight where there is a delay."""
    given = online.config(minibatches=2, delay=delay)
    whole = online.run(tmp_path / "whole", given)
    assert online.interrupted_run(tmp_path / "parts", given, terminate=1 + delay)
    left = len(read(tmp_path / "parts" / "rl.jsonl"))
    assert 0 < left < 6
    assert left % 2  # in the middle of a rollout
    again = online.run(tmp_path / "parts", given)
    assert again.resumed_at == left
    for name, weight in whole.weights.items():
        assert torch.equal(again.weights[name], weight), name
    assert read(tmp_path / "parts" / "rl.jsonl") == read(tmp_path / "whole" / "rl.jsonl")
    assert read(tmp_path / "parts" / "samples.jsonl") == read(tmp_path / "whole" / "samples.jsonl")


def test_two_ranks_are_one(tmp_path):
    alone, _ = ranks.run(online.on_ranks, 1, tmp_path / "one")[0]
    both = ranks.run(online.on_ranks, 2, tmp_path / "two")
    for name, weight in alone.items():
        assert torch.equal(both[0][0][name], both[1][0][name])
        torch.testing.assert_close(both[0][0][name], weight, rtol=1e-4, atol=1e-5)
    one, two = (read(tmp_path / name / "rl.jsonl") for name in ("one", "two"))
    for ours, theirs in zip(two, one, strict=True):
        for name in ("effective_sample_size", "rollout_effective_sample_size"):  # of each row by itself
            assert 0 < ours.pop(name) <= 1
            assert 0 < theirs.pop(name) <= 1
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    shutil.rmtree(tmp_path / "two")


def test_what_nobody_can_solve_ends_with_its_reason():
    given = online.config(rounds=3)
    data, sampler = rollouts(given)
    for prompt in data.prompts:
        object.__setattr__(prompt, "ground_truth", -1)
    with pytest.raises(TrainingError, match="step 0: no prompt of 3 rounds has answers that differ in reward"):
        data.batches(0)
    assert len(sampler.calls) == 3


def test_the_engine_is_a_sampler():
    """Through the real engine: the trainer's log-probabilities are its own, to the bit."""
    given = online.config(shared=True)
    model = online.policy()

    class Words:
        def decode(self, tokens):
            return " ".join(map(str, tokens))

    engine = Engine(model, tokenizer=Words(), end_token_ids=[online.STOP])
    sampler = EngineSampler(engine, SamplingOptions(max_tokens=5, samples=4))
    data = Rollouts(model, online.prompts(), sampler, Rewards(given.rewards), given)
    data.batches(0)
    assert data.metrics["mismatch_max_abs"] == 0
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1.01
    data.batches(1)
    assert data.metrics["mismatch_max_abs"] == 0  # after an update too


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout": {"minibatches": 5, "prompts": 4}}, "rollout.minibatches: expected at most prompts = 4"),
        ({"rollout": {"delay": 2}}, "rollout.delay: expected 0 or 1"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        online.config(**options["rollout"])


def test_parts_of_a_configuration_must_fit():
    with pytest.raises(ValueError, match=r"algorithm\.temperature: expected rollout\.temperature = 0\.7"):
        RLConfig(rollout=RolloutConfig(temperature=0.7))
    with pytest.raises(
        ValueError, match=r"advantages\.objectives\.width: expected one of the rewards accuracy, length"
    ):
        RLConfig(
            rewards=online.config().rewards,
            advantages=AdvantageConfig(objectives={"width": ObjectiveConfig()}, outcome=""),
        )
    with pytest.raises(ValueError, match=r"rollout\.prompts: expected at most 6"):
        rollouts(online.config(prompts=7))

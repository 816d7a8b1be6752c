"""How far samplers are from the trainer: nothing in shared numerics; where weights are packed, by the formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from m4ov.rl import mismatch
from m4ov.rl.certificates import Correction
from m4ov.rl_recipe import RolloutConfig
from tests.rl import online, small

ROLLOUT = RolloutConfig(samples=4, max_tokens=7, temperature=0.8, shared=True)


def found(rollout=ROLLOUT, **options):
    samples = [prompt.sample for prompt in online.prompts()]
    model = small.model(dtype=torch.float32, intermediate_size=64)
    return mismatch(model, samples, rollout, end_token_ids=[online.STOP], **options)


def test_the_models_own_weights_differ_by_nothing():
    """And each kind of packed weights by more than the one with more bits."""
    rows = {one.weights: one for one in found()}
    assert list(rows) == ["model", "int8", "int4", "fp8"]
    own = rows["model"]
    assert own.certificate.identical
    assert own.certificate.sequences == 24
    row = own.row()
    assert (row["max_abs"], row["mean_abs"], row["k3"], row["truncated"], row["bias"]) == (0, 0, 0, 0, 0)
    assert row["effective"] == row["effective_truncated"] == row["sequence_effective"] == pytest.approx(1, abs=1e-12)
    assert 0 < rows["int8"].row()["mean_abs"] < rows["int4"].row()["mean_abs"]
    assert 0 < rows["fp8"].row()["mean_abs"] < rows["int4"].row()["mean_abs"]
    for one in rows.values():
        assert 0 < one.sequences.effective <= 1 + 1e-12
        assert one.tokens.effective_truncated <= 1 + 1e-12


def test_another_seed_draws_others_and_the_same_seed_the_same():
    (one,), (again,), (other,) = (found(replace(ROLLOUT, seed=seed), weights=["int4"]) for seed in (0, 0, 1))
    assert one.row() == again.row()
    assert one.row()["mean_abs"] != other.row()["mean_abs"]


def test_figures_of_weights_are_their_definitions():
    random = np.random.default_rng(3)
    weights = random.lognormal(0.0, 1.0, 50)
    capped = np.minimum(weights, 1.5)
    made = Correction.of(torch.from_numpy(weights), torch.from_numpy(capped), 1.5)
    assert made.effective == pytest.approx(weights.sum() ** 2 / (50 * (weights**2).sum()))
    assert made.effective_truncated == pytest.approx(capped.sum() ** 2 / (50 * (capped**2).sum()))
    assert made.effective < made.effective_truncated
    assert made.truncated == (weights > 1.5).mean()
    assert made.bias == pytest.approx(1 - capped.mean() / weights.mean())


def test_truncation_is_of_the_weights_that_were_measured():
    """With a bound so low that many weights are above it: of tokens, and of answers."""
    (one,) = found(weights=["int4"], high=1.0)
    assert one.tokens.truncated > 0.1
    assert one.sequences.bias > 0
    assert one.tokens.effective_truncated > one.tokens.effective


@pytest.mark.parametrize(
    ("prompts", "weights", "message"),
    [([], ["model"], "prompts: expected at least one"), (None, ["int3"], "rollout.weights: expected model, int8")],
)
def test_what_is_refused(prompts, weights, message):
    samples = [prompt.sample for prompt in online.prompts()] if prompts is None else prompts
    with pytest.raises(ValueError, match=message):
        mismatch(online.policy(), samples, ROLLOUT, weights=weights)

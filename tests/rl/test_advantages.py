"""The composer's mathematics: the table against counting subsets and against drawing them, scales, ranks, what is told
apart."""

from __future__ import annotations

import os
from fractions import Fraction
from itertools import combinations, pairwise
from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m4ov.config import ConfigError, load
from m4ov.rl.advantages import compose, outcomes, pass_at_k, subset_advantages
from m4ov.rl.sampling import informative
from m4ov.rl_recipe import AdvantageConfig, ObjectiveConfig, RuleConfig
from m4ov_kernels.head import group_advantages, pass_at_k_advantages

SEED = int(os.environ["M4OV_TEST_SEED"])
ALWAYS_K = [RuleConfig(1.0, "pass_at_k")]


def counted(size, correct, k):
    """Mean and advantages by listing every subset: exact, of fractions."""
    right = [True] * correct + [False] * (size - correct)
    subsets = [(chosen, any(right[i] for i in chosen)) for chosen in combinations(range(size), k)]
    mean = Fraction(sum(reward for _, reward in subsets), len(subsets))
    sigma = sqrt(mean * (1 - mean))

    def of(member):
        rewards = [reward for chosen, reward in subsets if member in chosen]
        return float(Fraction(sum(rewards), len(rewards)) - mean) / sigma if sigma else 0.0

    return float(mean), of(size - 1) if correct < size else 0.0, of(0) if correct else 0.0


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_the_table_is_what_counting_all_subsets_gives(size):
    for k in range(1, size + 1):
        config = AdvantageConfig(k=k, rules=ALWAYS_K)
        table = outcomes(size, config)
        for correct in range(size + 1):
            mean, wrong, right = counted(size, correct, k)
            assert pass_at_k(size, correct, k) == pytest.approx(mean, abs=1e-15)
            found = subset_advantages(size, correct, k)
            assert found == (pytest.approx(wrong, abs=1e-12), pytest.approx(right, abs=1e-12))
            if correct > 0 and size - correct >= k:
                assert table.choices[correct] == "pass_at_k"
                assert table.values[correct].tolist() == list(found)
            rows = torch.tensor([True] * correct + [False] * (size - correct))
            theirs = pass_at_k_advantages(rows, size, k=k)
            ours = torch.where(rows, found[1], found[0])
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_the_table_of_the_paper_and_its_text():
    table = outcomes(16, AdvantageConfig(k=4, rules=ALWAYS_K))
    assert table.values[1].tolist() == pytest.approx([-0.1155, 1.7321], abs=1e-4)
    assert table.choices[0] == table.choices[16] == "skip"
    assert table.choices[12] == "pass_at_k"
    assert table.choices[13] == "pass_at_1"  # every four have a right one
    assert table.values[13].tolist() == pytest.approx([-sqrt(13 / 3), sqrt(3 / 13)])
    lines = table.text().splitlines()
    assert len(lines) == 18
    assert "pass_at_k" in lines[2]


def test_the_table_by_monte_carlo():
    """Subsets drawn at random: their rewards, standardised, on average over those that an answer is in."""
    random = np.random.default_rng(SEED)
    size, k, draws = 12, 4, 40_000
    order = np.argsort(random.random((draws, size)), axis=1)[:, :k]  # a k-subset each
    member = np.zeros((draws, size), dtype=bool)
    np.put_along_axis(member, order, True, axis=1)
    for correct in range(1, size - k + 1):
        reward = (order < correct).any(1).astype(float)  # the first are right
        standard = (reward - reward.mean()) / reward.std()
        wrong, right = subset_advantages(size, correct, k)
        for answer, expected in ((0, right), (size - 1, wrong)):
            among = standard[member[:, answer]]
            error = among.std() / sqrt(len(among)) + 0.02 * abs(expected)  # of this mean, and of mean and std above
            assert among.mean() == pytest.approx(expected, abs=6 * error + 1e-3), (correct, answer)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 40), data=st.data())
def test_what_holds_of_every_table(size, data):
    k = data.draw(st.integers(1, size))
    kind = data.draw(st.sampled_from(("grpo", "dr_grpo")))
    split = data.draw(st.floats(0, 0.99))
    rules = [RuleConfig(split, "pass_at_k"), RuleConfig(1.0, "pass_at_1")]
    table = outcomes(size, AdvantageConfig(kind=kind, k=k, rules=rules))
    for correct in range(size + 1):
        wrong, right = table.values[correct].tolist()
        assert correct * right + (size - correct) * wrong == pytest.approx(0, abs=1e-9)
        if table.choices[correct] == "skip":
            assert correct in (0, size)
            assert wrong == right == 0
        else:
            assert right > 0 > wrong  # something is told apart
            # Two values with the sum 0: pass@k weighs the prompts anew, and nothing inside one.
            assert right / -wrong == pytest.approx((size - correct) / correct)
        if table.choices[correct] == "pass_at_1":
            rewards = torch.tensor([1.0] * correct + [0.0] * (size - correct), dtype=torch.float64)
            theirs = group_advantages(rewards, size, kind=kind, unbiased=False, eps=0.0).advantages
            assert [right, wrong] == pytest.approx([theirs[0].item(), theirs[-1].item()])


def test_rules_choose_by_the_share_of_right_answers():
    rules = [RuleConfig(0.25, "pass_at_k"), RuleConfig(0.5, "pass_at_1"), RuleConfig(1.0, "skip")]
    table = outcomes(8, AdvantageConfig(k=2, rules=rules))
    assert table.choices == ("skip", "pass_at_k", "pass_at_k", "pass_at_1", "pass_at_1", *["skip"] * 4)
    assert not table.values[5:].any()
    with pytest.raises(ValueError, match=r"advantages.k: expected at most 3"):
        outcomes(3, AdvantageConfig(k=4))
    assert outcomes(3, AdvantageConfig(k=4, rules=[RuleConfig(1.0, "pass_at_1")])).choices[1] == "pass_at_1"


def objectives(**weights):
    return {
        name: ObjectiveConfig(*value) if isinstance(value, tuple) else ObjectiveConfig(value)
        for name, value in weights.items()
    }


def two_objectives(sizes, scale):
    random = torch.Generator().manual_seed(SEED)
    count = sum(sizes)
    correct = torch.rand(count, generator=random) < 0.4
    length = -torch.rand(count, generator=random, dtype=torch.float64) * scale
    return {"accuracy": correct.double(), "length": length}, correct


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
def test_no_objective_drowns_another(scale, kind):
    """However large its rewards are, an objective counts as much as its weight says."""
    sizes = [8] * 20
    values, correct = two_objectives(sizes, scale)
    config = AdvantageConfig(kind=kind, objectives=objectives(accuracy=1.0, length=0.5))
    found = compose(values, correct, sizes, config)
    for name, weight in (("accuracy", 1.0), ("length", 0.5)):
        part = found.parts[name]
        groups = part.view(20, 8)
        telling = (groups != 0).any(1)
        assert groups[telling].square().mean().sqrt().item() == pytest.approx(weight)
        assert groups.sum(1).abs().max() < 1e-9 * max(1, part.abs().max().item())
    torch.testing.assert_close(
        found.advantages.double(), found.parts["accuracy"] + found.parts["length"], rtol=1e-6, atol=1e-6
    )
    raw = compose(values, correct, sizes, AdvantageConfig(kind=kind, normalise="none", objectives=config.objectives))
    assert found.metrics["rms_length"] == pytest.approx(raw.metrics["rms_length"])
    if kind == "dr_grpo":
        assert raw.metrics["rms_length"] == pytest.approx(scale * 0.28, rel=0.3)


def test_parts_are_the_definition():
    """Written out: the table for what is right, standardised values among the right answers for their length."""
    values = {"accuracy": [1, 0, 1, 1, 0, 0, 1, 1.0], "length": [-1, -9, -3, -2, 5, 6, -4, -4.0]}
    correct = [True, False, True, True, False, False, True, True]
    config = AdvantageConfig(
        k=2,
        normalise="none",
        objectives=objectives(accuracy=1.0, length=(0.5, "correct")),
        rules=[RuleConfig(1.0, "pass_at_1")],
    )
    found = compose(values, correct, [4, 2, 2], config)
    root = sqrt(1 / 3)
    assert found.parts["accuracy"].tolist() == pytest.approx([root, -sqrt(3), root, root, 0, 0, 0, 0])
    mean, std = -2, sqrt(2 / 3)
    lengths = [(-1 - mean) / std, 0, (-3 - mean) / std, 0, 0, 0, 0, 0]
    assert found.parts["length"].tolist() == pytest.approx([0.5 * value for value in lengths], abs=1e-5)
    assert found.choices == ("pass_at_1", "skip", "skip")
    assert found.informative.tolist() == [True, False, False]
    assert found.metrics["informative"] == pytest.approx(1 / 3)
    assert found.metrics["chose_skip"] == pytest.approx(2 / 3)


def test_a_prompt_that_all_solve_still_teaches_to_be_short():
    values = {"accuracy": [1.0] * 4, "length": [-1.0, -2, -3, -4]}
    options = {"accuracy": 1.0, "length": (1.0, "correct")}
    found = compose(values, [True] * 4, [4], AdvantageConfig(objectives=objectives(**options)))
    assert found.informative.tolist() == [True]
    assert found.advantages.tolist() == sorted(found.advantages.tolist(), reverse=True)
    none = compose(values, [False] * 4, [4], AdvantageConfig(objectives=objectives(**options)))
    assert none.informative.tolist() == [False]
    assert not none.advantages.any()
    weightless = compose(values, [True] * 4, [4], AdvantageConfig(objectives=objectives(accuracy=1.0, length=0.0)))
    assert weightless.informative.tolist() == [False]


def test_an_objective_that_is_not_scaled_keeps_its_size_in_a_group():
    """ALP's lengths differ tenfold between two prompts: scaled, both press alike; as they are, tenfold too."""
    values = {"length": [-1.0, -2, -3, -10, -20, -30]}
    pressed = {}
    for scaled in (True, False):
        objective = ObjectiveConfig(0.5, "all", scaled=scaled)
        config = AdvantageConfig(outcome="", normalise="none", objectives={"length": objective})
        pressed[scaled] = compose(values, [True] * 6, [3, 3], config).advantages.tolist()
    root = 0.5 / sqrt(2 / 3)
    assert pressed[True] == pytest.approx([root, 0, -root, root, 0, -root], abs=1e-5)
    assert pressed[False] == pytest.approx([0.5, 0, -0.5, 5, 0, -5])


def test_ranks_together_are_the_step():
    """Each with its prompts: the same advantages as one process with all of them."""
    sizes = [4, 8, 6, 8, 3, 8]
    values, correct = two_objectives(sizes, 3.0)
    config = AdvantageConfig(k=2, objectives=objectives(accuracy=1.0, length=0.3))
    whole = compose(values, correct, sizes, config)
    bounds = [0, 3, 6]
    rows = np.cumsum([0, *sizes])
    parts = [slice(rows[a], rows[b]) for a, b in pairwise(bounds)]
    sent: list[list[float]] = []

    def of(rank, reduce):
        mine = {name: value[parts[rank]] for name, value in values.items()}
        return compose(mine, correct[parts[rank]], sizes[bounds[rank] : bounds[rank + 1]], config, reduce=reduce)

    for rank in (0, 1):
        of(rank, lambda own: sent.append(own) or own)
    total = [a + b for a, b in zip(*sent, strict=True)]
    found = [of(rank, lambda own: total) for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([each.advantages for each in found]), whole.advantages)
    assert found[0].metrics == found[1].metrics == pytest.approx(whole.metrics)


def test_what_is_equal_up_to_rounding_is_no_difference():
    values = {"accuracy": [1.0, 0, 1, 0], "length": [0.1, 0.1 + 1e-12, 0.1, 0.1]}
    config = AdvantageConfig(k=2, objectives=objectives(accuracy=1.0, length=1.0))
    found = compose(values, [True, False, True, False], [4], config)
    assert not found.parts["length"].any()
    assert compose({"accuracy": []}, [], [], AdvantageConfig()).advantages.shape == (0,)


@pytest.mark.parametrize(
    ("values", "correct", "sizes", "message"),
    [
        ({"accuracy": [1.0]}, [True], [2], r"correct: expected \[2\]"),
        ({"accuracy": [1.0, 0.0]}, [True, False], [2], "advantages.objectives.length: expected one of the rewards"),
        ({"accuracy": [1.0, 0.0], "length": [1.0]}, [True, False], [2], r"values\['length'\]: expected \[2\]"),
        ({"accuracy": [1.0, 0.0], "length": [1.0, float("nan")]}, [True, False], [2], "finite"),
        ({"accuracy": [1.0], "length": [1.0]}, [True], [1], "advantages.k: expected at most 1"),
    ],
)
def test_what_is_refused(values, correct, sizes, message):
    config = AdvantageConfig(k=2, objectives=objectives(accuracy=1.0, length=1.0))
    with pytest.raises(ValueError, match=message):
        compose(values, correct, sizes, config)


def test_a_recipe_is_checked(tmp_path):
    path = tmp_path / "advantages.yaml"
    path.write_text("objectives: {length: {weight: 0.3, among: correct}}\nrules: [{up_to: 1, use: pass_at_1}]\n")
    loaded = load(AdvantageConfig, path)
    assert loaded.objectives == objectives(accuracy=1.0, length=(0.3, "correct"))
    for override, message in (
        ("outcome=length", "advantages.objectives.length.among: expected all"),
        ("outcome=width", "advantages.outcome: expected one of accuracy, length"),
        ("rules=[{up_to: 0.5}]", "advantages.rules: expected rules with rising up_to"),
        ("rules=[{up_to: 1, use: often}]", "advantages.rules.use: expected pass_at_k or pass_at_1 or skip"),
        ("objectives.length.weight=-1", "advantages.weight: expected at least 0"),
        ("kind=ppo", "advantages.kind"),
        ("k=0", "advantages.k"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(AdvantageConfig, path, [override])


def test_dynamic_sampling_loses_nothing_and_ends():
    drawn = []

    def rounds():
        for first in range(0, 1000, 10):
            drawn.append(first)
            yield range(first, first + 10)

    found = informative(rounds(), lambda group: group % 3 == 0, wanted=7, most_rounds=50)
    assert found.kept == [0, 3, 6, 9, 12, 15, 18]
    assert (found.rounds, found.short, len(drawn)) == (2, False, 2)  # no more than needed
    assert sorted(found.kept + found.surplus + found.dropped) == list(range(20))
    found = informative(rounds(), lambda group: group == 5, wanted=2, most_rounds=3)
    assert (found.kept, found.surplus, found.short, len(found.dropped)) == ([5], [], True, 29)
    assert found.metrics["sampling_dropped"] == pytest.approx(29 / 30)
    assert informative([], bool, wanted=1, most_rounds=1).short
    with pytest.raises(ValueError, match="wanted: expected at least 1"):
        informative([], bool, wanted=0, most_rounds=1)

"""The recipe ``hybrid-rl``: what arms are trained with, and every wrong value by its name."""

from __future__ import annotations

import re

import pytest

from m4ov import config
from m4ov.config import ConfigError
from m4ov.hybrid_recipe import PARTS, START, HybridConfig, StartConfig, policy
from m4ov.manifest import StageConfig
from m4ov.rl_recipe import PerceptionConfig, RLConfig


def load(*overrides: str) -> HybridConfig:
    return config.load(HybridConfig, "hybrid-rl", overrides)


def test_an_arm_has_its_parts_and_no_others():
    found = load()
    assert set(found.arms) == {"accuracy", *PARTS, "all"}
    assert found.arms["all"] == list(PARTS)
    for name, parts in found.arms.items():
        own = found.policy_of(name, 7)
        assert own.rollout.seed == 7
        assert ("pass_at_k" in {rule.use for rule in own.advantages.rules}) == ("pass_at_k" in parts)
        assert (own.perception.weight > 0) == ("perception" in parts)
        assert own.perception == (found.policy.perception if "perception" in parts else PerceptionConfig())
        others = set(own.advantages.objectives) - {"accuracy"}
        assert others == (set(found.policy.advantages.objectives) - {"accuracy"} if "conciseness" in parts else set())
        assert own.rewards == found.policy.rewards
        assert own.algorithm == found.policy.algorithm
    assert found.policy == load().policy  # it was not changed


def test_updates_are_whole_rollouts():
    assert load("steps=60", "scale=0.1").updates == 6
    halved = ("policy.rollout.minibatches=2", "policy.rollout.epochs=2")
    assert load("steps=60", *halved).updates == 60
    assert load("steps=60", "scale=0.11", *halved).updates == 8
    assert load("steps=60", "scale=0.001", *halved).updates == 4


def test_the_start_is_a_curriculum_of_one_arm():
    whole = load("scale=0.5").manifest()
    assert list(whole.arms) == [START]
    assert whole.arms[START].steps == load().start.steps // 2
    assert list(whole.arms[START].stages) == list(load().start.stages)
    last = load("start.model=somewhere").manifest().arms[START]
    name, stage = list(load().start.stages.items())[-1]
    assert list(last.stages) == [name]
    assert last.steps == stage.steps * stage.rounds


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps=0"], "steps: expected at least 1, got 0"),
        (["scale=0"], "scale: expected more than 0, got 0"),
        (["chains.grids=0"], "chains.grids: expected at least 1, got 0"),
        (["chains.policy_grids=0"], "chains.policy_grids: expected at least 1, got 0"),
        (["chains.held_out=0"], "chains.held_out: expected at least 1, got 0"),
        (["chains.questions=0"], "chains.questions: expected at least 1, got 0"),
        (["chains.styles={long: 0, short: 0, direct: 0}"], "chains.styles: expected shares of long, short, direct"),
        (["chains.styles={brief: 1}"], "chains.styles: expected shares of long, short, direct"),
        (["measure.samples=0"], "measure.samples: expected at least 1, got 0"),
        (["measure.questions=-1"], "measure.questions: expected at least 0, got -1"),
        (["arms.start=[]"], "arms.start: expected another name, got 'start'"),
        (["arms.more=[speed]"], "arms.more: expected different ones of pass_at_k, perception, conciseness"),
        (["arms.more=[perception, perception]"], "arms.more: expected different ones of pass_at_k"),
        (["policy.perception.weight=0"], "policy.perception.weight: expected more than 0, for arms.perception, got 0"),
        (["policy.advantages.outcome=''"], "policy.advantages.outcome: expected an objective"),
        (["policy.advantages.k=0"], "advantages.k: expected at least 1, got 0"),
        (["policy.rollout.temperature=0.5"], "algorithm.temperature: expected rollout.temperature = 0.5"),
        (["parallel.tp=2"], "parallel.tp: expected 1: a policy is whole on every rank, got 2"),
        (["parallel.dp_shard=2"], "parallel.dp_shard: expected 1: a policy is whole on every rank, got 2"),
        (["start.steps=0"], "start.steps: expected at least 1, got 0"),
        (["start.stages.chains.mixture={places: 1}"], "start.stages.chains.mixture: no pool is named 'places'"),
        (["start.stages.chains.steps=0"], "start.stages.chains.steps: expected at least 1, got 0"),
        (["train.steps=5"], "train.steps (steps, start.steps): expected nothing"),
        (["policy.rollout.sample=4"], "unknown key policy.rollout.sample; did you mean policy.rollout.samples?"),
    ],
)
def test_a_wrong_value_is_named(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(*overrides)


def test_what_a_recipe_of_its_own_lacks_is_named():
    """Objectives and arms are names in a file, to which the recipe's are added; so not by one."""
    start = StartConfig(steps=1, stages={"all": StageConfig(mixture={"chains": 1.0}, steps=1, rounds=1)})
    one = policy()
    del one.advantages.objectives["concise"]
    message = "policy.advantages.objectives: expected another objective than accuracy, for arms.short, got ['accuracy']"
    with pytest.raises(ValueError, match=re.escape(message)):
        HybridConfig(start=start, policy=one, arms={"short": ["conciseness"]})
    with pytest.raises(ValueError, match="arms: expected at least one"):
        HybridConfig(start=start, arms={})
    with pytest.raises(ValueError, match=r"start\.stages: expected at least one"):
        HybridConfig(arms={"accuracy": []})
    with pytest.raises(ValueError, match=r"policy\.rewards\.components: expected at least one"):
        HybridConfig(start=start, policy=RLConfig(), arms={"accuracy": []})

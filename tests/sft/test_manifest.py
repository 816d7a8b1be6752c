"""The manifest: the shipped one, what overrides reach, and what is refused, by its full name."""

from __future__ import annotations

import re

import pytest

from m4ov import config
from m4ov.manifest import CurriculumConfig, pools_of, scaled

GOOD = """
task: curriculum
pools: {general: easy-vqa, domain: digits}
skills: {general: easy-vqa, domain: digits}
arms:
  start: {steps: 10, stages: {all: {mixture: {general: 1}, steps: 5}}}
  tuned:
    start: start
    steps: 10
    stages:
      knowledge:
        mixture: {domain: 2, general: 1}
        targets: {domain: {at_least: 0.9}}
        guards: {general: {epsilon: 0.02, pool: general}}
"""


@pytest.fixture
def load(tmp_path):
    def loaded(text: str, *overrides: str) -> CurriculumConfig:
        file = tmp_path / "manifest.yaml"
        file.write_text(text)
        return config.load(CurriculumConfig, file, overrides)

    return loaded


def test_the_shipped_manifest(tmp_path):
    found = config.load(CurriculumConfig, "curriculum")
    assert config.task(config.find("curriculum")) == "curriculum"
    assert list(found.arms) == ["start", "domain_only", "mixture", "curriculum", "allotted", "uniform"]
    compared = [found.arms[name] for name in ("domain_only", "mixture", "curriculum")]
    assert len({arm.steps for arm in compared}) == 1
    assert {arm.start for arm in compared} == {"start"}
    assert list(found.arms["curriculum"].stages) == ["knowledge", "restore", "refine"]
    assert not found.arms["curriculum"].stages["refine"].targets  # it spends what is left of the budget
    assert pools_of(found.arms["curriculum"]) == {"general", "domain"}


def test_overrides_reach_every_value(load):
    found = load(
        GOOD,
        "arms.tuned.stages.knowledge.guards.general.replay=0.3",
        "arms.tuned.stages.knowledge.freeze=[vision, merger]",
        "pools.domain=records.jsonl",
        "arms.start.steps=7",
    )
    stage = found.arms["tuned"].stages["knowledge"]
    assert stage.guards["general"].replay == 0.3
    assert stage.guards["general"].epsilon == 0.02
    assert stage.freeze == ["vision", "merger"]
    assert found.pools == {"general": "easy-vqa", "domain": "records.jsonl"}
    assert found.arms["start"].steps == 7


def test_scale_shortens_rounds_and_budgets(load):
    found = scaled(load(GOOD, "scale=0.01"))
    assert found.arms["tuned"].steps == found.arms["tuned"].stages["knowledge"].steps == 1
    assert scaled(load(GOOD, "scale=0.5")).arms["start"].stages["all"].steps == 2
    assert scaled(found) == found


TUNED = "arms.tuned.stages.knowledge"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{TUNED}.mixture.domian=1"], f"{TUNED}.mixture: no pool is named 'domian'; pools: general, domain"),
        ([f"{TUNED}.mixture.domain=0"], f"{TUNED}.mixture.domain: expected more than 0, got 0"),
        ([f"{TUNED}.mixture.domain=-2"], f"{TUNED}.mixture.domain: expected more than 0, got -2"),
        ([f"{TUNED}.mixture.domain=.inf"], f"{TUNED}.mixture.domain: expected more than 0, got inf"),
        ([f"{TUNED}.mixture.domain=.nan"], f"{TUNED}.mixture.domain: expected more than 0, got nan"),
        ([f"{TUNED}.guards.general.epsilon=null"], f"{TUNED}.guards.general.epsilon: expected how far"),
        ([f"{TUNED}.guards.domain.pool=domain"], f"{TUNED}.guards.domain.epsilon: expected how far"),
        ([f"{TUNED}.guards.general.epsilon=-0.1"], f"{TUNED}.guards.general.epsilon: expected how far"),
        ([f"{TUNED}.guards.general.pool=''"], f"{TUNED}.guards.general.pool: expected the pool"),
        ([f"{TUNED}.guards.general.pool=photos"], f"{TUNED}.guards.general.pool: no pool is named 'photos'"),
        ([f"{TUNED}.guards.general.add=0"], f"{TUNED}.guards.general: expected a rule by which replay rises"),
        ([f"{TUNED}.guards.general.replay=0.6"], f"{TUNED}.guards.general.replay: expected 0 to most (0.5)"),
        ([f"{TUNED}.guards.general.most=1.0"], f"{TUNED}.guards: expected a sum of most below 1"),
        ([f"{TUNED}.targets.reasoning.at_least=0.5"], f"{TUNED}.targets: no skill is named 'reasoning'"),
        ([f"{TUNED}.targets.domain.of_start=0.9"], f"{TUNED}.targets.domain: expected at_least or of_start"),
        ([f"{TUNED}.targets.domain.at_least=90"], f"{TUNED}.targets.domain.at_least: expected a share, at most 1"),
        ([f"{TUNED}.freeze=[tower]"], f"{TUNED}.freeze: no part is named 'tower'; parts: vision, merger"),
        ([f"{TUNED}.freeze=[vision, merger, language, embeddings]"], f"{TUNED}.freeze: expected something left"),
        ([f"{TUNED}.steps=0"], f"{TUNED}.steps: expected at least 1, got 0"),
        ([f"{TUNED}.learning_rate=0"], f"{TUNED}.learning_rate: expected more than 0"),
        ([f"{TUNED}.average.kind=swa"], f"{TUNED}.average.kind: expected none or ema or tail, got 'swa'"),
        ([f"{TUNED}.lora.rank=-1"], f"{TUNED}.lora.rank: expected at least 0"),
        (["arms.tuned.steps=0"], "arms.tuned.steps: expected at least 1, got 0"),
        (["arms.tuned.start=tuned"], "arms.tuned.start: expected an arm that stands above it (start), got 'itself"),
        (["arms.start.start=tuned"], "arms.start.start: expected an arm that stands above it, or nothing, got 'tuned"),
        (["arms.tuned.start=strat"], "arms.tuned.start: expected an arm that stands above it (start), got 'strat'"),
        (["skills.domain=''"], "targets: no skill is named 'domain'; skills: general"),
        (["skills.domain=''", "skills.general=''"], "skills: expected held-out data of at least one"),
        (["pools.domain=a.jsonl", "skills.domain=a.jsonl"], "skills.domain: expected other records than those of pool"),
        (["seeds=[]"], "seeds: expected different ones, got []"),
        (["seeds=[1, 1]"], "seeds: expected different ones"),
        (["scale=0"], "scale: expected more than 0"),
        (["gates.share=1"], "gates.share: expected more than 0 and less than 1"),
        (["train.steps=300"], "train.steps: expected nothing: arms.NAME.steps, got 300"),
        (["run.seed=1"], "run.seed: expected nothing: seeds=[…], got 1"),
        (["model.implementation=transformers"], "model.implementation: expected m4ov"),
    ],
)
def test_what_is_wrong_is_named(load, overrides, message):
    with pytest.raises(config.ConfigError) as error:
        load(GOOD, *overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: curriculum", "pools: expected at least one, got {}"),
        (GOOD.replace("steps: 5", "stps: 5"), "unknown key arms.start.stages.all.stps; did you mean"),
        (GOOD.replace("{mixture: {general: 1}, steps: 5}", "3"), "arms.start.stages.all: expected a mapping"),
        (GOOD.replace("{general: 1}", "{}"), "arms.start.stages.all.mixture: expected pools with weights"),
        (GOOD.replace("steps: 5", "steps: 1.5"), "arms.start.stages.all.steps: expected int, got 1.5"),
        (GOOD.replace("general: 1", "general: much"), "arms.start.stages.all.mixture.general"),
        (GOOD + "\narms: {}", "not a YAML mapping"),  # a key twice
    ],
)
def test_what_is_wrong_in_a_file_is_named(load, text, message):
    with pytest.raises(config.ConfigError) as error:
        load(text)
    assert message in str(error.value)


def test_a_cycle_says_so(load):
    for override in ("arms.start.start=tuned", "arms.tuned.start=tuned"):
        with pytest.raises(config.ConfigError, match=re.escape("a cycle")):
            load(GOOD, override)

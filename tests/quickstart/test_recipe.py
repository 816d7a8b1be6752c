"""The quickstart's recipe: the shipped one, what overrides reach, and what is refused, by its name."""

from __future__ import annotations

import pytest

from m4ov import config
from m4ov.quickstart_recipe import ARM, QuickstartConfig


def recipe(*overrides: str) -> QuickstartConfig:
    return config.load(QuickstartConfig, "quickstart", overrides)


def test_the_shipped_recipe():
    found = recipe()
    assert list(found.stages) == ["knowledge", "restore", "refine"]
    assert not found.stages["refine"].targets  # it spends what is left of the budget
    assert any(stage.guards for stage in found.stages.values())
    manifest = found.manifest()
    assert manifest.arms[ARM].steps == found.train.steps == 900
    most = sum(stage.steps * stage.rounds for stage in found.stages.values())
    assert most < 900  # so that it has some


def test_overrides_reach_stages_production_and_what_both_share():
    found = recipe("stages.knowledge.steps=7", "data.held_out_digits=540", "production.allot.questions=50", "scale=0.1")
    assert found.stages["knowledge"].steps == 7
    arm = found.manifest().arms[ARM]
    assert (arm.steps, arm.stages["knowledge"].steps, arm.stages["refine"].steps) == (90, 1, 5)
    build = found.build()
    assert (build.sources.held_out_digits, build.allot.questions) == (540, 50)
    assert build.run.folder == "runs/quickstart/data"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.refine.mixture.domian=1", "stages.refine.mixture: no pool is named 'domian'; pools: general, domain"),
        ("stages.refine.steps=0", "stages.refine.steps: expected at least 1, got 0"),
        ("stages.refine.stps=3", "unknown key stages.refine.stps; did you mean"),
        (
            "pools.general=[easy_vqqa]",
            "pools.general: expected sources: easy_vqa, scenes, digits, sheets, flags, photos",
        ),
        ("pools.more=[digits]", "pools.more: expected what domain has not, got 'digits'"),
        ("pools.domain=[]", "pools.domain: expected sources"),
        (
            "production.sources.held_out_digits=100",
            "production.sources.held_out_digits: expected nothing: data.held_out",
        ),
        ("production.sources.easy_vqa_folder=x", "production.sources.easy_vqa_folder: expected nothing: data.easy_vqa"),
        ("optim.warmup_steps=5", "optim.warmup_steps: expected nothing: stages' warmup, got 5"),
        ("train.steps=0", "train.steps: expected at least 1, got 0"),
        ("scale=0", "scale: expected more than 0"),
        ("compare.steps=0", "compare.steps: expected at least 1, got 0"),
    ],
)
def test_what_is_wrong_is_named(override, message):
    with pytest.raises(config.ConfigError) as error:
        recipe(override)
    assert message in str(error.value)
    assert "arms." not in str(error.value)

"""What the gates decide, as a table, and how replay becomes images."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m4ov.manifest import GuardConfig, StageConfig, TargetConfig
from m4ov.sft.gates import counts, decide, raised, shares

GUARD = GuardConfig(epsilon=0.02, pool="general", replay=0.2, factor=1.5, add=0.1, most=0.6)
STAGE = StageConfig(mixture={"domain": 1.0}, targets={"domain": TargetConfig(at_least=0.9)}, guards={"general": GUARD})


def decided(stage=STAGE, *, general, domain, left=True, arm=0.8, began=0.8, replay=0.2):
    return decide(
        stage,
        figures={"general": general, "domain": domain},
        arm_start={"general": arm, "domain": 0.1},
        stage_start={"general": began, "domain": 0.5},
        replay={skill: replay for skill in stage.guards},
        rounds_left=left,
    )


@pytest.mark.parametrize(
    ("general", "domain", "left", "action", "replay"),
    [
        (0.80, 0.90, True, "end", 0.2),  # both hold, each on its limit
        (0.78, 0.95, True, "end", 0.2),  # ε below the start is within
        (0.7799, 0.95, True, "raise replay", 0.4),  # the target holds, the guard does not
        (0.70, 0.50, True, "raise replay", 0.4),  # neither
        (0.80, 0.8999, True, "continue", 0.2),  # the guard holds: more of the same
        (0.80, 0.8999, False, "stop", 0.2),
        (0.70, 0.95, False, "stop", 0.2),
        (0.78, 0.95, False, "end", 0.2),  # the last round is as good as any
    ],
)
def test_the_table(general, domain, left, action, replay):
    found = decided(general=general, domain=domain, left=left)
    assert found.action == action
    assert found.over == (action in ("end", "stop"))
    assert found.replay == {"general": pytest.approx(replay)}
    assert found.guards["general"] == {"is": general, "must be": pytest.approx(0.78), "holds": general >= 0.8 - 0.02}
    assert found.targets["domain"] == {"is": domain, "must be": 0.9, "holds": domain >= 0.9}


def test_a_guard_is_held_against_the_higher_of_the_two_starts():
    """What stages lose does not add up; and what a stage has gained is guarded in the next."""
    assert decided(general=0.79, domain=0.95, arm=0.82, began=0.80).action == "raise replay"
    assert decided(general=0.79, domain=0.95, arm=0.1, began=0.82).action == "raise replay"
    assert decided(general=0.79, domain=0.95, arm=0.1, began=0.80).action == "end"


def test_a_target_may_be_of_the_start():
    stage = StageConfig(mixture={"domain": 1.0}, targets={"general": TargetConfig(of_start=0.98)})
    assert decided(stage, general=0.7841, domain=0.0).action == "end"
    found = decided(stage, general=0.7839, domain=0.0)
    assert found.action == "continue"
    assert found.targets["general"]["must be"] == pytest.approx(0.784)


def test_without_targets_no_gate_opens():
    stage = StageConfig(mixture={"domain": 1.0}, guards={"general": GUARD})
    assert decided(stage, general=0.9, domain=1.0).action == "continue"
    assert decided(stage, general=0.1, domain=1.0).action == "raise replay"
    assert decided(stage, general=0.9, domain=1.0, left=False).action == "stop"


def test_only_the_replay_of_what_was_lost_rises_and_not_above_most():
    other = GuardConfig(epsilon=0.5, pool="domain", replay=0.1)
    stage = StageConfig(mixture={"domain": 1.0}, guards={"general": GUARD, "domain": other})
    found = decided(stage, general=0.5, domain=0.5, replay=0.1)
    assert found.replay == {"general": pytest.approx(1.5 * 0.1 + 0.1), "domain": 0.1}
    assert decided(stage, general=0.5, domain=0.5, replay=0.35).replay["general"] == 0.6
    assert raised(GUARD, 0.6) == 0.6


def test_shares_are_of_mixture_and_replay():
    stage = StageConfig(mixture={"a": 3.0, "b": 1.0}, guards={"s": GuardConfig(epsilon=0.0, pool="b")})
    assert shares(stage, {"s": 0.2}) == pytest.approx({"a": 0.6, "b": 0.4})
    assert shares(stage, {"s": 0.0}) == pytest.approx({"a": 0.75, "b": 0.25})


@given(
    st.lists(st.floats(0.0, 100.0), min_size=1, max_size=6).filter(lambda weights: sum(weights) > 1e-6),
    st.integers(0, 300),
)
def test_counts_are_shares_to_within_one_image(weights, images):
    found = {f"pool {place}": weight / sum(weights) for place, weight in enumerate(weights)}
    whole = counts(found, images)
    assert sum(whole.values()) == images
    assert list(whole) == list(found)
    for pool, share in found.items():
        assert abs(whole[pool] - share * images) < 1 + 1e-6
    assert counts({"a": 0.5, "b": 0.5}, 3) == {"a": 2, "b": 1}  # of equal ones the first

"""The parts of the GRPO benchmark: its gate sees what it must, and ours runs as a side."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from m4ov_bench import generate, machine, rl, rl_gate, rl_sides
from m4ov_bench.peers import grpo
from m4ov_bench.session import OURS, Session

CASE = rl_sides.GrpoCase(2, 2, 4, 4, torch.float32, quick=True)
SEED = 5


@pytest.fixture(scope="module")
def judged():
    theirs, _ = rl_sides.begin(CASE, SEED)
    given = rl_gate.judged(theirs)
    return theirs, given, rl_gate.truth(theirs, given, torch.float32, SEED)


def ours(theirs, given):
    return rl_gate.ours(generate.ours_of(theirs).train(), given, SEED)


def test_our_loss_is_the_formula_and_the_gate_sees_another(judged):
    theirs, given, truth = judged
    found = ours(theirs, given)
    assert truth.judge(found).green
    ratio = (rl_gate.logprobs(theirs, given) - given.old).exp().detach()
    assert (ratio > 1.2).any()
    assert (ratio < 0.8).any()
    assert ((ratio - 1.2).abs() > 0.1).all()
    assert ((ratio - 0.8).abs() > 0.1).all()
    for wrong in (replace(given, advantages=given.advantages * 1.001), replace(given, old=given.old + 0.01)):
        assert not truth.judge(ours(theirs, wrong)).green
    (name, *_) = found.gradients
    spoiled = {**found.gradients, name: found.gradients[name] * 1.01}
    assert not truth.judge(replace(found, gradients=spoiled)).green


def test_without_trl_ours_is_measured_and_the_row_says_so(monkeypatch):
    monkeypatch.setattr(grpo.importlib.util, "find_spec", lambda name: None if name == "trl" else name)
    monkeypatch.setattr(rl, "CASES", (CASE,))
    (row,) = rl.benchmark(Session(replace(machine.describe(), seed=SEED), quick=True))
    assert row.green
    assert row.family == "rl"
    assert row.seconds > 0
    assert row.tokens == 2 * 2 * 4
    assert row.errors.keys() == {"loss", "gradients"}
    assert row.peers[grpo.TRL].absent == "trl is not installed: pip install 'm4ov[trl]'"
    assert row.peers[grpo.CHECKPOINTED].absent == "left out of the short run"
    assert "136 tokens in the update, 16 of them drawn" in row.note
    assert OURS not in row.peers


def test_both_are_rewarded_alike():
    class Answer:
        tokens = (3, 3, 4, 5)

    assert rl_sides.reward(Answer()) == 0.75
    assert rl_sides.rewards(completion_ids=[[3, 3, 4, 5], [1, 1, 1, 1]]) == [0.75, 0.25]

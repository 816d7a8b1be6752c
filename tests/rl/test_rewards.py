"""Rewards that hang, die, raise or lie: counted, with a value that is defined, nothing lost, the others undisturbed."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from m4ov.config import ConfigError, load
from m4ov.rl.rewards import Answer, Distribution, RewardError, Rewards
from m4ov.rl.rewards.pool import Pool
from m4ov.rl_recipe import RewardConfig, RewardsConfig

TROUBLED = "tests.rl.reward_functions:troubled"


def answers(*texts, truth="yes"):
    return [Answer(text, truth, range(len(text))) for text in texts]


def config(components, **options):
    return RewardsConfig({name: RewardConfig(**given) for name, given in components.items()}, **options)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # one that nobody has waited for is dead all the same


def gone(pid):
    deadline = time.monotonic() + 10
    while alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_whatever_a_function_does_to_its_process():
    """In order, each with what it did; the answers between are rewarded as if nothing had been."""
    texts = ["ok", "raise", "loop", "ok", "regex", "exit", "abort", "text", "print", "nan", "infinite", "ok"]
    pool = Pool(TROUBLED, {}, seconds=0.4, count=2)
    try:
        assert (pool.low, pool.high, pool.group) == (-1, 1, False)
        found = pool(answers(*texts))
        assert [outcome.failure for outcome in found] == [
            *(None, "raised", "timed out", None, "timed out", "died", "died", "raised"),
            *(None, None, None, None),
        ]
        assert found[1].message == "KeyError: 'no such thing'"
        assert found[5].message == "its process ended (exit status 3)"
        assert found[6].message == "its process ended (signal 6)"
        assert "could not convert string to float" in found[7].message
        assert [found[i].value for i in (0, 3, 8, 11)] == [0.5] * 4  # what is printed is no reply
        assert math.isnan(found[9].value)
        assert pool.replaced == 4
        assert [outcome.value for outcome in pool(answers(*["ok"] * 20))] == [0.5] * 20
        assert pool([]) == []
    finally:
        pool.close()


def test_what_a_hanging_function_started_ends_with_it():
    pool = Pool(TROUBLED, {}, seconds=5)
    try:
        (found,) = pool(answers("child"))
        child = int(found.message.split()[-1])
        assert found.failure == "raised"
        assert alive(child)
        workers = [worker.process.pid for worker in pool._workers]
        assert all(map(alive, workers))
    finally:
        pool.close()
    assert gone(child)
    assert all(map(gone, workers))


def test_processes_end_with_the_trainer():
    """Killed, so that it can end none of them itself: an idle one sees the end of its input."""
    program = (
        "from m4ov.rl.rewards import Answer\nfrom m4ov.rl.rewards.pool import Pool\nimport os, signal\n"
        f"pool = Pool({TROUBLED!r}, {{}}, seconds=5)\nprint(pool._workers[0].process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert found.returncode == -9, found.stderr
    assert gone(int(found.stdout))


def test_rewards_import_no_torch():
    program = (
        "import sys, m4ov.rl.rewards.worker; print([m for m in ('torch', 'numpy', 'omegaconf') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "[]", found.stderr


def test_scores_of_groups():
    components = {
        "accuracy": {"function": "exact-match"},
        "length": {"function": "adaptive-length", "options": {"max_length": 10}},
        "own": {"function": "tests.rl.reward_functions:of_group"},
        "share": {"function": "tests.rl.reward_functions:length_share", "options": {"most": 4}, "seconds": 0},
    }
    with Rewards(config(components)) as rewards:
        scores = rewards([answers("yes", "no", "yes", "maybe"), answers("no", "no")])
    assert scores.correct == [True, False, True, False, False, False]
    assert scores.counts == [(4, 2), (2, 0)]
    assert list(scores.values) == ["accuracy", "length", "own", "share"]
    assert scores.values["own"] == [2] * 4 + [0] * 2
    lengths = [3, 2, 3, 5, 2, 2]
    assert scores.values["length"] == pytest.approx([-0.5 * n / 10 for n in lengths])  # 1/K of 2 is a half too
    assert scores.values["share"] == [0.75, 0.5, 0.75, 1, 0.5, 0.5]
    assert all(failure is None for failures in scores.failures.values() for failure in failures)


def test_failures_have_a_value_and_are_counted():
    components = {
        "accuracy": {"function": TROUBLED, "seconds": 0.4, "on_failure": -0.25},
        "other": {"function": TROUBLED, "seconds": 0.4},
    }
    with Rewards(config(components, correct_at_least=0.5)) as rewards:
        scores = rewards([answers("ok", "raise", "sleep", "exit", "nan", "infinite")])
    assert scores.values["accuracy"] == [0.5, -0.25, -0.25, -0.25, -0.25, 1.0]
    assert scores.values["other"] == [0.5, -1, -1, -1, -1, 1.0]
    assert scores.correct == [True] + [False] * 5  # infinitely much is not right
    kinds = [None, "raised", "timed out", "died", "NaN", "out of range"]
    assert scores.failures["accuracy"] == kinds
    found = scores.distributions["other"]
    assert found.failures == dict.fromkeys(kinds[1:], 1)
    assert (found.count, found.failed, found.min, found.max) == (6, 5, -1, 1)
    assert found.messages["raised"] == "KeyError: 'no such thing'"
    assert "1 timed out" in found.text()


def test_values_do_not_depend_on_the_number_of_processes():
    texts = [f"{'x' * (7 * i % 23)}" for i in range(60)]
    component = {"accuracy": {"function": "tests.rl.reward_functions:length_share"}}
    found = []
    for workers in (1, 3):
        with Rewards(config(component, workers=workers)) as rewards:
            found.append(rewards([answers(*texts[:20]), answers(*texts[20:])]).values)
    assert found[0] == found[1]


def test_distributions_are_those_of_numpy():
    values = np.random.default_rng(int(os.environ["M4OV_TEST_SEED"])).normal(size=101).tolist()
    found = Distribution.of(values, [None] * 101, [""] * 101)
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert found.std == pytest.approx(np.std(values))
    for share, quantile in found.quantiles.items():
        assert quantile == pytest.approx(np.quantile(values, share))
    assert found.as_json()["quantiles"].keys() == {"0.05", "0.25", "0.5", "0.75", "0.95"}
    assert Distribution.of([], [], []).count == 0


@pytest.mark.parametrize(
    ("components", "options", "message"),
    [
        ({}, {}, "rewards.components: expected at least one"),
        ({"accuracy": {"function": "exact"}}, {}, "rewards.components.accuracy: function: no reward is named"),
        (
            {"accuracy": {"function": "no.such.module:f"}},
            {},
            "rewards.components.accuracy: function: no.such.module cannot be imported",
        ),
        (
            {"accuracy": {"function": "tests.rl.reward_functions:undeclared"}},
            {},
            "rewards.components.accuracy: .*expected a declared range",
        ),
        (
            {"accuracy": {"function": "exact-match", "on_failure": 2.0}},
            {},
            "rewards.components.accuracy: on_failure: expected 0 to 1",
        ),
        (
            {"accuracy": {"function": "exact-match"}},
            {"correct_at_least": 0.0},
            "correct_at_least: expected more than 0",
        ),
        (
            {"accuracy": {"function": "cosine", "options": {"max_length": 4}}},
            {},
            "rewards.correct: accuracy asks itself",
        ),
        (
            {"accuracy": {"function": "tests.rl.slow_to_import:reward", "low": 0, "high": 1}},
            {"start_seconds": 0.3},
            "its process did not start in 0.3 s",
        ),
    ],
)
def test_what_is_refused(components, options, message):
    with pytest.raises(RewardError, match=message):
        Rewards(config(components, **options))


def test_a_recipe_is_checked(tmp_path):
    path = tmp_path / "rewards.yaml"
    text = "components:\n  accuracy: {function: number, options: {absolute: 0.5}}\n  form: {function: format}\n"
    path.write_text(text)
    loaded = load(RewardsConfig, path, ["components.form.options.tags=[think,answer]"])
    assert loaded.components["accuracy"].options == {"absolute": 0.5}
    assert loaded.components["form"].options == {"tags": ["think", "answer"]}
    for override, message in (
        ("correct=form2", "rewards.correct: expected one of accuracy, form"),
        ("workers=0", "rewards.workers: expected at least 1"),
        ("components.form.second=1", "did you mean components.form.seconds"),
        ("components.form.low=.nan", "rewards.low: expected a finite number"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(RewardsConfig, path, [override])

"""Advantages, reward shaping, rollout weights and divergences against loops and published numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m4ov_kernels import device_errors
from m4ov_kernels.head import (
    group_advantages,
    kl_estimate,
    overlong_penalty,
    pass_at_k_advantages,
    rollout_weights,
)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 6), max_size=5),
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(("grpo", "dr_grpo")),
    unbiased=st.booleans(),
    binary=st.booleans(),
)
def test_group_advantages(sizes, seed, kind, unbiased, binary):
    torch.manual_seed(seed)
    rewards = torch.randint(2, (sum(sizes),)).double() if binary else torch.randn(sum(sizes), dtype=torch.float64)
    found = group_advantages(rewards, torch.tensor([0, *sizes]).cumsum(0), kind=kind, unbiased=unbiased, eps=1e-4)
    expected, flags = [rewards.new_zeros(0)], []
    for group in rewards.split(sizes):
        equal = len(set(group.tolist())) < 2
        flags.append(equal)
        centred = group - group.mean()
        scale = group.std(correction=int(unbiased)) + 1e-4 if kind == "grpo" and not equal else 1.0
        expected.append(torch.zeros_like(group) if equal else centred / scale)
    torch.testing.assert_close(found.advantages, torch.cat(expected), rtol=1e-12, atol=1e-13)
    assert found.zero_std.tolist() == flags
    assert not found.advantages.requires_grad


def test_groups_of_one_size_and_equal_rewards_exactly():
    rewards = torch.tensor([0.1, 0.1, 0.1, 1.0, 0.0, 0.5]).double()
    rewards[:3] = 0.1  # whose mean in float64 is not 0.1
    by_size, by_bounds = group_advantages(rewards, 3), group_advantages(rewards, torch.tensor([0, 3, 6]))
    for one, other in zip(by_size, by_bounds, strict=True):
        assert torch.equal(one, other)
    assert by_size.advantages[:3].tolist() == [0.0, 0.0, 0.0]
    assert by_size.zero_std.tolist() == [True, False]
    assert by_size.advantages[3:].tolist() == pytest.approx([1.0, -1.0, 0.0], abs=1e-5)
    assert by_size.std.tolist() == pytest.approx([0.0, 0.5])


@settings(max_examples=40)
@given(right=st.integers(0, 9), wrong=st.integers(0, 9), k=st.integers(1, 6))
def test_pass_at_k_against_counting(right, wrong, k):
    total = right + wrong
    if total < k:
        return
    correct = torch.tensor([True] * right + [False] * wrong, dtype=torch.bool)
    found = pass_at_k_advantages(correct, total, k=k)
    fails = math.comb(wrong, k) / math.comb(total, k)
    sigma = math.sqrt(fails * (1 - fails))
    expected = [0.0] * total
    if sigma:
        of_wrong = (fails - math.comb(wrong - 1, k - 1) / math.comb(total - 1, k - 1)) / sigma if wrong else 0.0
        expected = [fails / sigma] * right + [of_wrong] * wrong
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert found.double().sum().item() == pytest.approx(0.0, abs=1e-5)


def test_pass_at_k_of_the_paper():
    def of(right):
        found = pass_at_k_advantages(torch.arange(16) < right, 16, k=4)
        return found[0].item(), found[-1].item()

    assert of(1) == pytest.approx((1.732, -0.1155), abs=5e-4)
    assert of(8) == pytest.approx((0.2, -0.2), abs=5e-4)
    assert of(13) == (0.0, 0.0)
    uneven = pass_at_k_advantages(torch.tensor([True, False, True, False, False]), torch.tensor([0, 2, 5]), k=1)
    assert uneven.tolist() == pytest.approx([1.0, -1.0, 2**0.5, -(2**-0.5), -(2**-0.5)], rel=1e-6)
    with pytest.raises(ValueError, match="k must be from 1 to 2, the size of the smallest group; got 3"):
        pass_at_k_advantages(torch.ones(5).bool(), torch.tensor([0, 2, 5]), k=3)
    with pytest.raises(ValueError, match="k must be from 1 to the size of the smallest group; got 6"):
        pass_at_k_advantages(torch.ones(5).bool(), 5, k=6)


def test_overlong_penalty():
    lengths = torch.tensor([0, 16384, 16385, 18432, 20480, 20481, 10**9])
    found = overlong_penalty(lengths, max_length=20480, cache_length=4096)
    assert found.tolist() == [0.0, 0.0, -1 / 4096, -0.5, -1.0, -1.0, -1.0]


LOG_RATIO = torch.tensor([0.1, 1.0, -1.0, 3.0, 0.2, 50.0])
BOUNDS = torch.tensor([0, 3, 3, 5, 6])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [math.exp(0.1), 2.0, math.exp(-1), 2.0, math.exp(0.2), 2.0]),
        ({"high": 5.0}, [math.exp(0.1), math.e, math.exp(-1), 5.0, math.exp(0.2), 5.0]),
        ({"kind": "icepop"}, [math.exp(0.1), math.e, 0.0, 0.0, math.exp(0.2), 0.0]),
        ({"kind": "icepop", "low": 0.2, "high": 2.0}, [math.exp(0.1), 0.0, math.exp(-1), 0.0, math.exp(0.2), 0.0]),
        ({"kind": "mis"}, [math.exp(0.1), 0.0, math.exp(-1), 0.0, math.exp(0.2), 0.0]),
        ({"level": "sequence"}, [math.exp(0.1)] * 3 + [2.0] * 3),
        ({"level": "sequence", "high": 1e9}, [math.exp(0.1)] * 3 + [math.exp(3.2)] * 2 + [math.exp(20)]),
        ({"level": "geometric", "high": 9.0}, [math.exp(0.1 / 3)] * 3 + [math.exp(1.6)] * 2 + [9.0]),
        ({"kind": "mis", "level": "sequence"}, [math.exp(0.1)] * 3 + [0.0] * 3),
    ],
)
def test_rollout_weights(options, expected):
    rollout = -torch.rand(6)
    logprob = (rollout + LOG_RATIO).requires_grad_()
    found = rollout_weights(logprob, rollout, BOUNDS, **options)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert not found.requires_grad


def test_ignored_rows_have_no_weight_in_their_sequence():
    rollout, mask = torch.zeros(6), torch.tensor([True, False, True, True, True, True])
    logprob = LOG_RATIO.clone()
    logprob[1] = math.nan
    found = rollout_weights(logprob, rollout, BOUNDS, level="geometric", mask=mask)
    assert found[:3].tolist() == pytest.approx([math.exp(-0.45), 0.0, math.exp(-0.45)])


def test_divergences():
    logprob, reference = -torch.rand(50, dtype=torch.float64), -torch.rand(50, dtype=torch.float64)
    d = reference - logprob
    for kind, expected in (("k1", -d), ("k2", d * d / 2), ("k3", d.exp() - 1 - d)):
        torch.testing.assert_close(kl_estimate(logprob, reference, kind=kind), expected, rtol=1e-10, atol=1e-14)
    assert (kl_estimate(logprob, reference) >= 0).all()
    assert kl_estimate(torch.zeros(2), torch.tensor([1e5, -1e5])).isfinite().all()
    near = kl_estimate(torch.zeros(1), torch.tensor([1e-4]))  # e^d − 1 − d in float32 would be noise
    assert near.item() == pytest.approx(5e-9, rel=1e-2)


def test_k3_is_the_divergence_on_average():
    """Over a whole vocabulary, weighted by its probabilities: an unbiased estimate is exact."""
    policy, reference = (torch.randn(40, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = (policy.exp() * (policy - reference)).sum()
    for kind in ("k1", "k3"):
        estimate = (policy.exp() * kl_estimate(policy, reference, kind=kind)).sum()
        torch.testing.assert_close(estimate, exact, rtol=1e-11, atol=0.0)


def test_no_value_on_the_device_is_looked_at(monkeypatch):
    monkeypatch.setattr(device_errors, "_flags", {})  # whose values cannot be read afterwards
    rows, bounds = torch.rand(6, device="meta"), BOUNDS.to("meta")
    for groups in (3, bounds):
        found = group_advantages(rows, groups)
        assert (found.advantages.shape, found.zero_std.dtype) == ((6,), torch.bool)
        assert pass_at_k_advantages(rows > 0, groups, k=2).shape == (6,)
    for level in ("token", "sequence", "geometric"):
        assert rollout_weights(rows, rows, bounds, level=level, kind="icepop").shape == (6,)
    assert overlong_penalty(bounds, max_length=5, cache_length=2).shape == (5,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: group_advantages(torch.ones(4).half(), 2), TypeError, "group_advantages: rewards must be a dense"),
        (lambda: group_advantages(torch.ones(2, 2), 2), ValueError, r"rewards must be \[n\]; got \[2, 2\]"),
        (lambda: group_advantages(torch.ones(4), 3), ValueError, "groups must be 1 or greater, and a divisor of the 4"),
        (lambda: group_advantages(torch.ones(4), 2.0), TypeError, "groups must be an int or an int32 or int64 tensor"),
        (lambda: group_advantages(torch.ones(4), torch.tensor([0, 3])), ValueError, r"groups\[1\] is 3: expected 4"),
        (lambda: group_advantages(torch.ones(4), 2, kind="rloo"), ValueError, "kind must be one of 'grpo', 'dr_grpo'"),
        (lambda: pass_at_k_advantages(torch.ones(4), 2, k=1), TypeError, "correct must be a bool tensor"),
        (lambda: pass_at_k_advantages(torch.ones(4).bool(), 2, k=1.0), TypeError, "k must be an int; got float"),
        (lambda: overlong_penalty(torch.ones(2), max_length=3, cache_length=1), TypeError, "lengths must be an int32"),
        (
            lambda: overlong_penalty(torch.ones(2).int(), max_length=3, cache_length=4),
            ValueError,
            "overlong_penalty: cache_length must be between 1 and 3, max_length; got 4",
        ),
        (lambda: kl_estimate(torch.ones(2), torch.ones(3)), ValueError, r"ref_logprob must be \[2\], as logprob"),
        (lambda: kl_estimate(torch.ones(2), torch.ones(2), kind="k9"), ValueError, "kl_estimate: kind must be one of"),
        (
            lambda: rollout_weights(torch.ones(6), torch.ones(5), BOUNDS),
            ValueError,
            r"rollout_weights: rollout_logprob must be \[6\], as logprob; got \[5\]",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()

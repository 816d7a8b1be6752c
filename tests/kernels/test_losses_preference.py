"""dpo_loss and mpo_loss against loops over padded pairs; the moving average δ; micro-batches."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m4ov_kernels.head import RewardMean, dpo_loss, mpo_loss

from . import losses_plain as plain
from .losses_plain import Batch
from .numerics import assert_accurate

LENGTHS = [9, 12, 0, 5, 40, 33, 7, 0, 0, 0, 64, 64]
MPO = (0.8, 0.2, 1.0)


def run(batch: Batch, loss, **options):
    leaf = batch["logprob"].clone().requires_grad_()
    found, metrics = loss(leaf, batch["ref_logprob"], batch.cu_seqlens, mask=batch.mask, **options)
    found.backward()
    return found.detach(), leaf.grad, metrics


def run_plain(batch: Batch, *arguments):
    rows = {name: plain.padded(values, batch.lengths) for name, values in batch.rows.items()}
    rows["logprob"].requires_grad_()
    loss = plain.preference(rows, plain.padded(batch.mask, batch.lengths), *arguments)
    loss.backward()
    return loss.detach(), plain.unpadded(rows["logprob"].grad, batch.lengths)


@settings(max_examples=50)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=4),
    seed=st.integers(0, 2**32 - 1),
    keep=st.sampled_from((0.0, 0.7, 1.0)),
    beta=st.sampled_from((0.1, 2.0)),
    label_smoothing=st.sampled_from((0.0, 0.1)),
    delta=st.sampled_from((None, 0.0, -0.4)),
)
def test_against_loops_over_padded_pairs(pairs, seed, keep, beta, label_smoothing, delta):
    torch.manual_seed(seed)
    batch = plain.batch(list(itertools.chain.from_iterable(pairs)), keep=keep)
    options = {"normalizer": 3, "beta": beta, "label_smoothing": label_smoothing}
    if delta is None:
        found, grad, metrics = run(batch, dpo_loss, **options)
        expected, expected_grad = run_plain(batch, 3, beta, (1.0, 0.0, 0.0), 0.0, label_smoothing)
    else:
        found, grad, metrics = run(batch, mpo_loss, delta=delta, **options)
        expected, expected_grad = run_plain(batch, 3, beta, MPO, delta, label_smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-12)
    assert all(value.shape == () and value.dtype is torch.float32 for value in metrics.values())


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), MPO])
def test_float32(weights):
    batch = plain.batch(LENGTHS, torch.float32)
    if weights == MPO:
        loss, grad, _ = run(batch, mpo_loss, normalizer=6, delta=torch.tensor(0.3))
    else:
        loss, grad, _ = run(batch, dpo_loss, normalizer=6)
    theirs = run_plain(batch, 6, 0.1, weights, 0.3)
    exact = run_plain(batch.to(torch.float64), 6, 0.1, weights, 0.3)
    assert_accurate("loss", loss, theirs[0], exact[0])
    assert_accurate("grad_logprob", grad, theirs[1], exact[1])


def test_gradcheck():
    batch = plain.batch([3, 2, 0, 4], keep=1.0)
    leaf = batch["logprob"].clone().requires_grad_()
    arguments = (batch["ref_logprob"], batch.cu_seqlens)
    assert torch.autograd.gradcheck(lambda x: dpo_loss(x, *arguments, normalizer=2, label_smoothing=0.2)[0], leaf)
    assert torch.autograd.gradcheck(lambda x: mpo_loss(x, *arguments, normalizer=2, delta=0.2)[0], leaf)


@pytest.mark.parametrize("options", [{}, {"delta": 0.3}])
def test_any_split_between_pairs_gives_the_same_bits(options):
    batch = plain.batch(LENGTHS, torch.float32)
    loss = mpo_loss if options else dpo_loss
    whole, grad, metrics = run(batch, loss, normalizer=5, **options)
    for cuts in ([0, 6, 12], [0, 2, 4, 6, 8, 10, 12], [0, 0, 10, 12]):
        parts = [run(batch.part(*cut), loss, normalizer=5, **options) for cut in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat([part[1] for part in parts]), grad)
        assert sum(part[0].item() for part in parts) == pytest.approx(whole.item(), rel=1e-6)
        for name in ("loss", "pairs", "tokens", "reward_sum", "reward_count"):
            assert sum(part[2][name].item() for part in parts) == pytest.approx(metrics[name].item(), rel=1e-5), name


def test_metrics_of_pairs_that_can_be_counted_by_hand():
    logprob = torch.tensor([-1.0, -2.0, -3.0, -1.0, -1.0])
    reference = torch.tensor([-2.0, -2.0, -1.0, -1.0, -3.0])
    bounds = torch.tensor([0, 2, 3, 4, 5, 5, 5])  # Δ: 1 and −2; 0 and 2; and a pair of nothing
    _, metrics = dpo_loss(logprob, reference, bounds, normalizer=2, beta=0.5)
    expected = {
        "pairs": 2,
        "tokens": 5,
        "reward_chosen": 0.25,
        "reward_rejected": 0.0,
        "reward_margin": 0.25,
        "reward_accuracy": 0.5,
        "reward_sum": 0.5,
        "reward_count": 4,
        "logprob_chosen": -2.0,
        "logprob_rejected": -2.0,
        "kl_k1": 0.2,
        "dpo_loss": (math.log1p(math.exp(-1.5)) + math.log1p(math.exp(1.0))) / 2,
    }
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-6), name
    _, metrics = dpo_loss(logprob, logprob, bounds, normalizer=2)
    assert metrics["reward_accuracy"].item() == 0.5  # equal rewards are half right


def test_an_unchanged_policy_loses_log_two_and_learns_by_half():
    batch = plain.batch([4, 3], torch.float32, keep=1.0)
    batch.rows["ref_logprob"] = batch["logprob"].clone()
    loss, grad, _ = run(batch, dpo_loss, normalizer=1, beta=0.25)
    assert loss.item() == pytest.approx(math.log(2))
    assert torch.equal(grad, torch.tensor([-0.125] * 4 + [0.125] * 3))


def test_rewards_of_any_size():
    batch = plain.batch([3, 3], torch.float32, keep=1.0)
    for size in (1e3, 1e8):
        for sign in (1.0, -1.0):
            batch.rows["logprob"] = batch["ref_logprob"] + sign * size
            for found in (run(batch, dpo_loss, normalizer=1), run(batch, mpo_loss, normalizer=1, delta=-size)):
                assert found[0].isfinite()
                assert found[1].isfinite().all()


def test_the_moving_average():
    state = RewardMean.start()
    assert state.delta == 0
    state = state.update(torch.tensor(6.0), torch.tensor(4.0))
    assert state.delta == 1.5
    assert state.update(torch.tensor(-2.0), torch.tensor(4.0)).delta == 0.5  # the mean of all so far
    assert state.update(-2.0, 2, decay=0.5).delta == 0.25  # (3 − 2) / (2 + 2)
    assert state.update(0.0, 0).delta == 1.5
    with pytest.raises(ValueError, match=r"RewardMean\.update: decay must be between 0 and 1; got 2"):
        state.update(1.0, 1, decay=2)


def test_delta_is_the_same_in_all_micro_batches_and_moves_between_steps():
    """Three steps, whole and in two parts: the same gradients and the same δ."""
    whole, parted = RewardMean.start(), RewardMean.start()
    for _ in range(3):
        batch = plain.batch(LENGTHS)
        _, grad, metrics = run(batch, mpo_loss, normalizer=6, delta=whole.delta)
        parts = [run(batch.part(*cut), mpo_loss, normalizer=6, delta=parted.delta) for cut in ((0, 8), (8, 12))]
        torch.testing.assert_close(torch.cat([part[1] for part in parts]), grad, rtol=1e-6, atol=1e-9)
        assert metrics["delta"].item() == pytest.approx(whole.delta.item(), rel=1e-6)
        whole = whole.update(metrics["reward_sum"], metrics["reward_count"], decay=0.9)
        sums = [sum(part[2][name] for part in parts) for name in ("reward_sum", "reward_count")]
        parted = parted.update(*sums, decay=0.9)
    assert whole.delta != 0
    assert parted.delta.item() == pytest.approx(whole.delta.item(), rel=1e-5)


T = torch.ones(5)
BOUNDS = torch.tensor([0, 2, 5])


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "ref_logprob must be a dense float32 or float64 tensor; got NoneType None", {"ref_logprob": None}),
        (ValueError, r"cu_seqlens must be \[2P \+ 1\]: bounds of a chosen .*; got \[2\]", {"cu_seqlens": BOUNDS[::2]}),
        (ValueError, "beta must be above 0; got 0", {"beta": 0}),
        (ValueError, "label_smoothing must be between 0 and 0.5; got 0.7", {"label_smoothing": 0.7}),
        (ValueError, "normalizer must be greater than 0; got 0", {"normalizer": 0}),
        (ValueError, "delta must be a finite number.*; got nan", {"delta": math.nan}),
        (TypeError, "delta must be a number or a tensor with one element; got float32", {"delta": T}),
        (ValueError, "bco_weight must be a finite number, at least 0; got -1", {"bco_weight": -1}),
    ],
)
def test_what_is_refused(error, message, changes):
    arguments = {"logprob": T, "ref_logprob": T, "cu_seqlens": BOUNDS, "normalizer": 1, "delta": 0.0} | changes
    with pytest.raises(error, match="mpo_loss: " + message):
        mpo_loss(**arguments)
    if not changes.keys() & {"delta", "bco_weight"}:
        del arguments["delta"]
        with pytest.raises(error, match="dpo_loss: " + message):
            dpo_loss(**arguments)

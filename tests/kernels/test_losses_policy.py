"""policy_loss against the papers' formulas in loops, and what packing, micro-batches and large ratios leave alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import m4ov_kernels
from m4ov_kernels import device_errors
from m4ov_kernels.head import kl_estimate, policy_loss
from m4ov_kernels.head.losses.rows import check_on_device

from . import losses_plain as plain
from .losses_plain import KINDS, Batch
from .numerics import assert_accurate

LENGTHS = [9, 0, 40, 1, 77, 16, 33, 2]


def options_of(batch: Batch, kind: str, terms: bool) -> dict:
    found = {"kind": kind, "mask": batch.mask}
    if terms:
        found |= {name: batch[name] for name in ("ref_logprob", "rollout_logprob", "entropy")}
        found |= {"kl_coef": 0.07, "entropy_coef": 0.03, "correction": "tis"}
    return found


def run(batch: Batch, normalizer, **options):
    """Loss, gradients of log-probabilities and of what else has some, metrics."""
    leaf = batch["logprob"].clone().requires_grad_()
    others = {name: options[name].clone().requires_grad_() for name in ("entropy", "exact_kl") if name in options}
    options.setdefault("advantages", batch.advantages)
    loss, metrics = policy_loss(
        leaf,
        batch["old_logprob"],
        cu_seqlens=batch.cu_seqlens,
        normalizer=normalizer,
        **(options | others),
    )
    loss.backward()
    return (
        loss.detach(),
        [t.grad if t.grad is not None else torch.zeros_like(t) for t in (leaf, *others.values())],
        metrics,
    )


def run_plain(batch: Batch, normalizer, kind, per_token=False, others=(), **options):
    rows = {name: plain.padded(values, batch.lengths) for name, values in batch.rows.items()}
    for name in ("logprob", *others):
        rows[name].requires_grad_()
    advantages = plain.padded(batch.token_advantages, batch.lengths) if per_token else batch.advantages
    keep = plain.padded(batch.mask, batch.lengths)
    loss, metrics, size = plain.policy(rows, keep, advantages, normalizer, kind, **options)
    loss.backward()
    grads = [rows[name].grad for name in ("logprob", *others)]
    grads = [torch.zeros_like(rows["logprob"]) if grad is None else grad for grad in grads]
    return loss.detach(), [plain.unpadded(grad, batch.lengths) for grad in grads], metrics, size


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def same_metrics(ours, theirs):
    for name, value in theirs.items():
        assert ours[name].item() == pytest.approx(value, rel=1e-5, abs=1e-6), name


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 7), max_size=6),
    kind=st.sampled_from(KINDS),
    per_token=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    keep=st.sampled_from((0.0, 0.7, 1.0)),
    dual_clip=st.sampled_from((None, 1.3)),
    aggregation=st.sampled_from((None, "token", "sequence")),
    kl=st.sampled_from((None, "k1", "k2", "k3", "exact")),
    entropy=st.booleans(),
    correction=st.sampled_from((None, ("tis", (0.0, 2.0)), ("icepop", (0.5, 5.0)), ("mis", (0.0, 2.0)))),
    level=st.sampled_from(("token", "sequence", "geometric")),
)
def test_against_loops_over_padded_sequences(
    lengths, kind, per_token, seed, keep, dual_clip, aggregation, kl, entropy, correction, level
):
    torch.manual_seed(seed)
    batch = plain.batch(lengths, keep=keep)
    dual_clip = None if kind == "cispo" else dual_clip
    ours = {"kind": kind, "mask": batch.mask, "dual_clip": dual_clip, "aggregation": aggregation}
    theirs = {"kind": kind, "per_token": per_token, "dual_clip": dual_clip, "aggregation": aggregation}
    if per_token:
        ours |= {"advantages": batch.token_advantages, "advantages_per": "token"}
    others = []
    if kl:
        ours |= {"kl_coef": 0.3, "kl_kind": kl, "ref_logprob": batch["ref_logprob"]}
        theirs |= {"kl_coef": 0.3, "kl_kind": kl}
    if entropy:
        ours |= {"entropy_coef": 0.2, "entropy": batch["entropy"]}
        theirs |= {"entropy_coef": 0.2}
        others.append("entropy")
    if kl == "exact":
        ours |= {"exact_kl": batch["exact_kl"]}
        others.append("exact_kl")
    if correction:
        ours |= {"correction": correction[0], "correction_level": level, "rollout_logprob": batch["rollout_logprob"]}
        theirs |= {"correction": correction[0], "bounds": correction[1], "level": level}
    loss, grads, metrics = run(batch, 17.0, **ours)
    expected, expected_grads, expected_metrics, _ = run_plain(batch, 17.0, others=others, **theirs)
    close(loss, expected)
    for ours_grad, theirs_grad in zip(grads, expected_grads, strict=True):
        close(ours_grad, theirs_grad)
    same_metrics(metrics, expected_metrics)
    assert all(value.shape == () and value.dtype is torch.float32 for value in metrics.values())


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind):
    batch = plain.batch(LENGTHS, torch.float32)
    options = options_of(batch, kind, terms=True)
    loss, grads, _ = run(batch, 5.0, **options)
    terms = {"kl_coef": 0.07, "entropy_coef": 0.03, "correction": "tis", "others": ("entropy",)}
    theirs, theirs_grads, *_ = run_plain(batch, 5.0, kind, **terms)
    exact, exact_grads, _, size = run_plain(batch.to(torch.float64), 5.0, kind, **terms)
    assert_accurate("loss", loss, theirs, exact, size)
    for name, *each in zip(("grad_logprob", "grad_entropy"), grads, theirs_grads, exact_grads, strict=True):
        assert_accurate(name, *each)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    """CISPO's weight is a constant by definition: checked where both bounds make it one."""
    batch = plain.batch([3, 0, 4], keep=1.0)
    leaves = tuple(batch[name].clone().requires_grad_() for name in ("logprob", "entropy", "exact_kl"))
    clip = {"clip_low": 0.0, "clip_high": 0.0} if kind == "cispo" else {}

    def loss(logprob, entropy, exact_kl):
        return policy_loss(
            logprob,
            batch["old_logprob"],
            batch.advantages,
            batch.cu_seqlens,
            normalizer=3,
            kind=kind,
            entropy=entropy,
            entropy_coef=0.2,
            exact_kl=exact_kl,
            kl_kind="exact",
            kl_coef=0.3,
            **clip,
        )[0]

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_gradcheck_of_the_divergences(kind):
    logprob, reference = (torch.randn(9, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, reference, kind=kind), logprob.requires_grad_())


@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_any_split_and_order_gives_the_same_bits(kind, terms):
    """A row's gradient depends on its own sequence: the same bits in one call and in any micro-batches."""
    batch = plain.batch(LENGTHS, torch.float32)
    normalizer = torch.tensor(float(batch.tokens()))
    whole, whole_grads, whole_metrics = run(batch, normalizer, **options_of(batch, kind, terms))
    for cuts in ([0, 3, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 5, 5, 8]):
        parts = [batch.part(*pair) for pair in itertools.pairwise(cuts)]
        found = [run(part, normalizer, **options_of(part, kind, terms)) for part in parts]
        for index, grad in enumerate(whole_grads):
            assert torch.equal(torch.cat([grads[index] for _, grads, _ in found]), grad)
        for name in ("loss", "policy_loss", "tokens", "sequences"):
            total = sum(metrics[name].item() for *_, metrics in found)
            assert total == pytest.approx(whole_metrics[name].item(), rel=1e-5, abs=1e-7), name
        assert sum(loss.item() for loss, *_ in found) == pytest.approx(whole.item(), rel=1e-5, abs=1e-7)
        tokens = sum(metrics["tokens"].item() * metrics["policy_kl_k3"].item() for *_, metrics in found)
        assert tokens / batch.tokens() == pytest.approx(whole_metrics["policy_kl_k3"].item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unchanged_policy_has_ratio_one_and_the_plain_policy_gradient(kind):
    batch = plain.batch(LENGTHS, torch.float32)
    counts = [int(part.sum()) for part in batch.mask.split(batch.lengths)]
    for old in (batch["logprob"].clone(), None):
        batch.rows["old_logprob"] = old
        _, (grad, *_), metrics = run(batch, 4.0, kind=kind, mask=batch.mask)
        for name in ("ratio_mean", "ratio_min", "ratio_max", "effective_sample_size"):
            assert metrics[name].item() == 1.0
        for name in ("clip_fraction_low", "clip_fraction_high", "policy_kl_k1", "policy_kl_k3"):
            assert metrics[name].item() == 0.0
        divisors = [float(max(count, 1)) if plain.PAPER[kind][0] == "sequence" else 1.0 for count in counts]
        per_sequence = -batch.advantages.double() / torch.tensor(divisors, dtype=torch.float64) / 4.0
        expected = torch.where(batch.mask, per_sequence.repeat_interleave(torch.tensor(batch.lengths)), 0.0)
        torch.testing.assert_close(grad.double(), expected, rtol=2**-22, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [25.0, 100.0, 1e4])
def test_no_ratio_overflows(kind, size):
    """Beyond e^20 a ratio is a constant; loss, gradient and metrics stay finite with any sign of the advantage."""
    batch = plain.batch([6, 6], torch.float32, keep=1.0)
    shift = size * torch.tensor([1.0, -1.0] * 6)
    for name in ("logprob", "ref_logprob", "rollout_logprob"):
        batch.rows[name] = batch["old_logprob"] + shift
        shift = -shift
    batch.advantages = torch.tensor([1.0, -1.0])
    for kl_kind, correction in (("k3", "tis"), ("k3", "icepop"), ("k2", "mis")):
        options = options_of(batch, kind, True) | {"kl_kind": kl_kind, "correction": correction}
        loss, grads, metrics = run(batch, 12, **options)
        assert loss.isfinite()
        assert all(grad.isfinite().all() for grad in grads)
        assert all(value.isfinite() for value in metrics.values())
        assert metrics["ratio_max"].item() <= math.exp(20) * (1 + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_counts(kind):
    for lengths, keep in (([], 1.0), ([0, 0, 0], 1.0), ([3, 0, 5], 0.0)):
        batch = plain.batch(lengths, torch.float32, keep=keep)
        loss, grads, metrics = run(batch, 1, **options_of(batch, kind, True))
        assert loss == 0.0
        assert all((grad == 0).all() for grad in grads)
        assert all(value == 0 for value in metrics.values())


def test_int32_bounds_and_a_tensor_of_one_element_as_normalizer():
    batch = plain.batch([4, 3], torch.float32)
    arguments = (batch["logprob"], batch["old_logprob"], batch.advantages)
    one, _ = policy_loss(*arguments, batch.cu_seqlens, normalizer=7, mask=batch.mask)
    other, _ = policy_loss(*arguments, batch.cu_seqlens.int(), normalizer=torch.tensor([7]), mask=batch.mask)
    assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_strides(dtype):
    batch = plain.batch([4, 0, 3], dtype)
    whole, grads, _ = run(batch, 7, **options_of(batch, "gspo", True))
    rows = {name: torch.stack((values, values), 1)[:, 0] for name, values in batch.rows.items()}
    advantages, mask = (t.repeat_interleave(2)[::2] for t in (batch.advantages, batch.mask))
    apart = Batch(rows, mask, [4, 0, 3], advantages, batch.token_advantages)
    bounds = apart.cu_seqlens.repeat_interleave(2)[::2]
    assert not any(t.is_contiguous() for t in (*rows.values(), mask, advantages, bounds))
    leaf = rows["logprob"].requires_grad_()
    options = {"normalizer": 7, **options_of(apart, "gspo", True)}
    loss, _ = policy_loss(leaf, rows["old_logprob"], apart.advantages, bounds, **options)
    assert torch.equal(loss, whole)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], grads[0])


def test_an_advantage_for_each_sequence_where_there_are_as_many_tokens():
    batch = plain.batch([2, 0], keep=1.0)
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    arguments = (batch["logprob"], None, advantages, batch.cu_seqlens)
    by_sequence, _ = policy_loss(*arguments, normalizer=1, kind="dapo")
    by_token, _ = policy_loss(*arguments, normalizer=1, kind="dapo", advantages_per="token")
    assert (by_sequence.item(), by_token.item()) == (-2.0, 0.0)


T = torch.ones(5)
BOUNDS = torch.tensor([0, 2, 5])


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (
            TypeError,
            "logprob must be a dense float32 or float64 tensor; got bfloat16 tensor",
            {"logprob": T.bfloat16()},
        ),
        (ValueError, r"logprob must be \[T\], packed; got \[5, 1\]", {"logprob": T[:, None]}),
        (ValueError, r"old_logprob must be \[5\], as logprob; got \[4\]", {"old_logprob": T[:4]}),
        (ValueError, r"advantages must be \[2\], one a sequence or \[5\], one a row; got \[3\]", {"advantages": T[:3]}),
        (ValueError, r"advantages must be \[5\], one a row; got \[2\]", {"advantages_per": "token"}),
        (ValueError, "advantages_per must be one of 'token', 'sequence'; got 'row'", {"advantages_per": "row"}),
        (TypeError, "mask must be a bool tensor, True in rows that count; got float32", {"mask": T}),
        (TypeError, "cu_seqlens must be an int32 or int64 tensor; got list", {"cu_seqlens": [0, 5]}),
        (ValueError, r"cu_seqlens\[2\] is 1: expected 4 or greater", {"cu_seqlens": torch.tensor([0, 4, 1])}),
        (ValueError, r"cu_seqlens\[2\] is 4: expected 5, the number", {"cu_seqlens": torch.tensor([0, 2, 4])}),
        (ValueError, r"cu_seqlens\[0\] is 1: expected 0", {"cu_seqlens": torch.tensor([1, 2, 5])}),
        (ValueError, "cu_seqlens must be bounds of 5 rows; got bounds of no", {"cu_seqlens": torch.tensor([0])}),
        (ValueError, "kind must be one of 'grpo', 'dr_grpo', .*; got 'ppo'", {"kind": "ppo"}),
        (ValueError, "aggregation must be one of", {"aggregation": "mean"}),
        (ValueError, "clip_low must be between 0 and 1; got 1.5", {"clip_low": 1.5}),
        (ValueError, "clip_high must be a finite number, at least 0; got nan", {"clip_high": math.nan}),
        (ValueError, "dual_clip must be greater than 1; got 0.5", {"dual_clip": 0.5}),
        (ValueError, "dual_clip must be None with kind='cispo'; got 3", {"dual_clip": 3, "kind": "cispo"}),
        (ValueError, "normalizer must be greater than 0; got 0", {"normalizer": 0}),
        (ValueError, "normalizer must be greater than 0; got tensor", {"normalizer": torch.tensor(-1.0)}),
        (TypeError, "normalizer must be a number or a tensor with one element", {"normalizer": T}),
        (TypeError, "normalizer must be a number; got str 'mean'", {"normalizer": "mean"}),
        (ValueError, "ref_logprob must be given with kl_coef=0.1; got None", {"kl_coef": 0.1}),
        (ValueError, "exact_kl must be given with kl_kind=", {"kl_coef": 0.1, "kl_kind": "exact"}),
        (ValueError, "kl_kind must be one of 'k1', 'k2', 'k3', 'exact'; got 'k4'", {"kl_kind": "k4"}),
        (ValueError, "kl_coef must be a finite number, at least 0; got -0.1", {"kl_coef": -0.1}),
        (ValueError, "entropy must be given with entropy_coef=0.1; got None", {"entropy_coef": 0.1}),
        (ValueError, "rollout_logprob must be given with correction='tis'; got None", {"correction": "tis"}),
        (ValueError, "correction must be one of 'tis', 'icepop', 'mis'; got 'pis'", {"correction": "pis"}),
        (ValueError, "correction_level must be one of", {"correction": "tis", "correction_level": "batch"}),
        (ValueError, "correction_low must be None with", {"correction": "tis", "correction_low": 0.5}),
        (ValueError, "correction_high must be above 0, and", {"correction": "icepop", "correction_high": 0.4}),
    ],
)
def test_what_is_refused(error, message, changes):
    arguments = {"logprob": T, "old_logprob": T, "advantages": T[:2], "cu_seqlens": BOUNDS, "normalizer": 5} | changes
    with pytest.raises(error, match="policy_loss: " + message):
        policy_loss(**arguments)


def test_wrong_bounds_on_a_device_are_recorded_and_safe(monkeypatch):
    """The device's half, run where its values can be seen."""
    monkeypatch.setattr(device_errors, "_flags", {})
    bounds, valid = check_on_device(torch.tensor([0, 2, 5]), 5)
    assert valid
    assert bounds.tolist() == [0, 2, 5]
    m4ov_kernels.check()
    for given_bounds, position in (([0, 9, 5], 2), ([3, 2, 5], 0), ([0, 2, 4], 2), ([0, -7, 5], 1)):
        bounds, valid = check_on_device(torch.tensor(given_bounds), 5)
        assert not valid
        assert bounds.min() >= 0
        assert bounds.max() <= 5
        assert (bounds.diff() >= 0).all()
        with pytest.raises(
            ValueError, match=rf"head\.losses: cu_seqlens or groups\[{position}\] is not 0 at the start"
        ):
            m4ov_kernels.check()

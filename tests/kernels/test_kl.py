"""linear_kl: what is its own; what it shares with all operators is in ``test_operators.py``."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import m4ov_kernels
from m4ov_kernels.head import linear_kl, linear_logprob, native_logprob, policy_loss

from . import losses_plain as plain
from . import strategies
from .numerics import assert_accurate, gradients, leaves, logit_terms
from .operators import CASES, Call

KINDS = ("forward", "reverse", "jsd")
HEADS = ("hidden_states", "weight", "ref_hidden_states", "ref_weight", "bias", "ref_bias")


def inputs(rows, width, ref_width, vocab, dtype, bias=False, magnitude=1.0):
    """Keyword arguments of two heads."""
    made = {}
    for prefix, dim in (("", width), ("ref_", ref_width)):
        made[f"{prefix}hidden_states"] = strategies.tensor((rows, dim), dtype, magnitude=magnitude)
        made[f"{prefix}weight"] = strategies.tensor((vocab, dim), dtype, magnitude=dim**-0.5)
        made[f"{prefix}bias"] = strategies.tensor((vocab,), dtype) if bias else None
    return made


def run(heads, grad, wanted=("hidden_states", "weight", "bias"), dtype=None, **options):
    """The divergence, and the gradients of ``wanted``."""
    heads = {name: x if x is None or dtype is None else x.to(dtype) for name, x in heads.items()}
    wanted = [name for name in wanted if heads[name] is not None]
    tensors = leaves(heads["weight"].dtype, *(heads[name] for name in wanted))
    found = linear_kl(**heads | dict(zip(wanted, tensors, strict=True)), **options)
    return [found, *gradients(found, tensors, [grad.to(found.dtype)])]


def _judge(heads, **options):
    """Results and gradients by the shared case's rule."""
    defaults = {"mask": None, "num_valid": None, "temperature": 1.0, "numerics": "fp32"}
    arguments = {**heads, **defaults, **options}
    wanted = tuple(name for name in ("hidden_states", "weight", "bias") if arguments[name] is not None)
    call = Call(arguments, {"divergence": torch.randn(heads["hidden_states"].shape[:-1])}, wanted)
    CASES["linear_kl"].judge(call, CASES["linear_kl"].evaluate(call))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", strategies.HALF_AND_SINGLE)
@pytest.mark.parametrize(
    ("rows", "width", "ref_width", "vocab"),
    [(5, 8, 8, 30), (70, 33, 16, 500), (66, 600, 130, 193), (3, 1, 2, 1)],
)
def test_against_float64(isa, rows, width, ref_width, vocab, dtype, bias, kind):
    heads = inputs(rows, width, ref_width, vocab, dtype, bias)
    mask = torch.rand(rows) < 0.7 if rows > 5 else None
    _judge(heads, kind=kind, mask=mask, temperature=0.6 if bias else 1.0)


BITS = [(torch.bfloat16, kind) for kind in KINDS] + [(torch.float32, "reverse"), (torch.float16, "forward")]


@pytest.mark.parametrize(("dtype", "kind"), BITS)
def test_a_row_keeps_its_bits(isa, dtype, kind, monkeypatch):
    """In any company, at any place, on any number of threads, in chunks of any size: forward and hidden gradient."""
    heads = inputs(150, 72, 40, 2000, dtype, bias=True)
    grad = torch.randn(150)
    whole = run(heads, grad, kind=kind)
    threads = torch.get_num_threads()
    try:
        for count, budget, some in ((1, 1, 150), (2, 1 << 30, 1), (3, 1, 65), (2, 1 << 30, 149)):
            torch.set_num_threads(count)
            monkeypatch.setattr(native_logprob, "SCRATCH_BYTES", budget)
            chosen = torch.randperm(150)[:some]
            part = {name: x[chosen] if name.endswith("hidden_states") else x for name, x in heads.items()}
            got = run(part, grad[chosen], kind=kind)
            masked = torch.zeros(150, dtype=torch.bool).index_fill_(0, chosen, True)
            among = run(heads, grad, kind=kind, mask=masked)
            for name, ours, other, before in zip(("divergence", "grad"), got[:2], among[:2], whole[:2], strict=True):
                assert torch.equal(ours, before[chosen]), (name, count, budget, some)
                assert torch.equal(other[chosen], before[chosen]), (name, count, budget, some)
                assert not other[~masked].any()
    finally:
        torch.set_num_threads(threads)


def by_pytorch(heads):
    log_p, log_q = (
        ((heads[f"{head}hidden_states"] @ heads[f"{head}weight"].t() + heads[f"{head}bias"]) / 0.5).log_softmax(-1)
        for head in ("", "ref_")
    )
    return {
        "forward": F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1),
        "reverse": torch.distributions.kl_divergence(
            *(torch.distributions.Categorical(logits=x) for x in (log_p, log_q))
        ),
        "jsd": sum(
            F.kl_div(((log_p.exp() + log_q.exp()) / 2).log(), x, reduction="none", log_target=True).sum(-1) / 2
            for x in (log_p, log_q)
        ),
    }


def test_the_definitions_are_pytorchs():
    """In float64, where only another formula could differ; the kernels by the numerics rule."""
    heads = inputs(12, 8, 5, 40, torch.float32, bias=True)
    wide = {name: value.double() for name, value in heads.items()}
    plain, exact = by_pytorch(heads), by_pytorch(wide)
    sizes = [
        logit_terms(*(heads[f"{head}{name}"] for name in ("hidden_states", "weight", "bias"))) for head in ("", "ref_")
    ]
    terms = sum(size.amax(-1) for size in sizes) / 0.5
    for kind, value in exact.items():
        found = linear_kl(**wide, kind=kind, temperature=0.5)  # no factor of temperature²
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-13)
        with m4ov_kernels.backend("native"):
            ours = linear_kl(**heads, kind=kind, temperature=0.5)
        assert_accurate(kind, ours, plain[kind], value, terms)


@pytest.mark.parametrize("dtype", strategies.HALF_AND_SINGLE)
@pytest.mark.parametrize("kind", KINDS)
def test_one_head_twice_is_exactly_nothing(isa, kind, dtype):
    heads = inputs(70, 24, 24, 700, dtype, bias=True)
    heads |= {f"ref_{name}": heads[name] for name in ("hidden_states", "weight", "bias")}
    found, *grads = run(heads, torch.ones(70), kind=kind)
    assert not found.any()
    for grad in grads:
        assert grad.abs().max() < 1e-5
        assert kind == "jsd" or not grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_are_nearly_one(isa, kind):
    """Where a policy starts: as exact as float32 logits allow, and never below 0."""
    heads = inputs(64, 32, 32, 3000, torch.float32)
    hidden = heads["hidden_states"]
    heads |= {"ref_weight": heads["weight"], "ref_hidden_states": hidden + 1e-3 * torch.randn_like(hidden)}
    grad = torch.ones(64)
    found, *grads = run(heads, grad, kind=kind)
    with m4ov_kernels.backend("reference"):
        exact, *exact_grads = run(heads, grad, dtype=torch.float64, kind=kind)
    assert (found >= 0).all()
    assert 1e-8 < exact.mean() < 1e-6
    largest = float((hidden @ heads["weight"].t()).abs().max())
    assert (found - exact).abs().max() < 2 * 2.0**-23 * (1 + largest)  # two logits' last places
    for ours, truth in zip(grads, exact_grads, strict=True):
        assert (ours - truth).norm() < 2e-3 * truth.norm()
    _judge(heads, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("magnitude", [1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outliers(isa, dtype, magnitude, kind):
    _judge(inputs(30, 16, 9, 200, dtype, magnitude=magnitude), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_far_temperatures(isa, temperature, kind):
    _judge(inputs(20, 16, 16, 150, torch.float32), kind=kind, temperature=temperature)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_words_that_both_heads_rule_out(isa, kind, backend):
    heads = inputs(9, 8, 5, 360, torch.float32, bias=True)
    for name in ("bias", "ref_bias"):
        heads[name][10:330] = -math.inf  # whole tiles
    allowed = torch.cat([torch.arange(10), torch.arange(330, 360)])
    small = {name: x if name.endswith("hidden_states") else x[allowed] for name, x in heads.items()}
    grad = torch.randn(9)
    with m4ov_kernels.backend(backend):
        found, *grads = run(heads, grad, kind=kind)
        expected, *fewer = run(small, grad, kind=kind)
    torch.testing.assert_close(found, expected)
    for ours, truth in zip(
        grads,
        (
            fewer[0],
            *(torch.zeros_like(g).index_copy_(0, allowed, f) for g, f in zip(grads[1:], fewer[1:], strict=True)),
        ),
        strict=True,
    ):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_words_that_one_head_rules_out(isa, backend):
    """Infinite where the mean is over the other's words, else finite; the symmetric one never more than ln 2."""
    grad = torch.ones(7)
    for ruled_out, endless in (("bias", "forward"), ("ref_bias", "reverse")):
        heads = inputs(7, 8, 5, 300, torch.float32, bias=True)
        heads[ruled_out][100:250] = -math.inf
        with m4ov_kernels.backend(backend):
            for kind in KINDS:
                found, *grads = run(heads, grad, kind=kind)
                if kind == endless:
                    assert (found == math.inf).all()
                    finite = kind == "forward"  # p - q
                    assert all(bool(g.isfinite().all()) is finite for g in grads)
                    continue
                assert found.isfinite().all()
                assert all(g.isfinite().all() for g in grads)
                assert kind != "jsd" or (found.min() > 0 and found.max() <= math.log(2.0) + 1e-6)
        _judge(heads, kind="jsd")


def test_disjoint_heads_are_ln_2_apart(isa):
    heads = inputs(5, 8, 8, 200, torch.float32, bias=True)
    heads["bias"][100:], heads["ref_bias"][:100] = -math.inf, -math.inf
    found, *grads = run(heads, torch.ones(5), kind="jsd")
    torch.testing.assert_close(found, torch.full((5,), math.log(2.0)))
    assert all(g.abs().max() < 1e-6 for g in grads)


def test_rows_that_do_not_count_reach_nothing(isa):
    heads = inputs(20, 16, 9, 90, torch.float32)
    mask = torch.rand(20) < 0.5
    mask[:2] = torch.tensor([True, False])
    grad = torch.randn(20)
    expected = run(heads, grad, mask=mask)
    for name in ("hidden_states", "ref_hidden_states"):
        heads[name] = torch.where(mask[:, None], heads[name], math.nan)
    for ours, before in zip(run(heads, grad, mask=mask), expected, strict=True):
        assert torch.equal(ours, before)
        assert ours.isfinite().all()
    assert not expected[0][~mask].any()
    found, *grads = run(heads, grad, mask=torch.zeros(20, dtype=torch.bool))
    assert not any(x.any() for x in (found, *grads))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_reference(kind):
    heads = inputs(4, 3, 2, 6, torch.float64, bias=True)
    heads["bias"][2] = heads["ref_bias"][2] = -math.inf
    rest = {name: heads[name] for name in ("ref_hidden_states", "ref_weight", "ref_bias")}
    tensors = leaves(torch.float64, *(heads[name] for name in ("hidden_states", "weight")))
    mask = torch.tensor([True, False, True, True])

    def function(h, w):
        return linear_kl(h, w, bias=heads["bias"], kind=kind, temperature=0.7, mask=mask, **rest)

    with m4ov_kernels.backend("reference"):
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)


def test_a_reference_that_learns_is_refused_and_a_shared_weight_is_not():
    heads = inputs(6, 8, 8, 30, torch.float32)
    weight, hidden = (heads[name].requires_grad_() for name in ("weight", "hidden_states"))
    other = heads["ref_hidden_states"]
    with pytest.raises(ValueError, match=r"linear_kl: ref_weight must be a constant: ref_weight.detach\(\); got one"):
        linear_kl(hidden, weight, other, weight)
    with torch.no_grad():
        expected = linear_kl(hidden, weight, other, weight)
    found = linear_kl(hidden, weight, other, weight.detach(), kind="forward")
    assert torch.equal(found, expected)
    # A constant: the same gradient as with a copy.
    grads = gradients(found.sum(), (hidden, weight), [torch.ones(())])
    copied = linear_kl(hidden, weight, other, weight.detach().clone())
    assert all(
        torch.equal(a, b)
        for a, b in zip(grads, gradients(copied.sum(), (hidden, weight), [torch.ones(())]), strict=True)
    )


def test_a_frozen_tensor_gets_nothing(isa):
    heads = inputs(9, 16, 8, 70, torch.float32, bias=True)
    grad = torch.randn(9)
    whole = run(heads, grad)
    for wanted in (("hidden_states",), ("weight",), ("bias",)):
        found, one = run(heads, grad, wanted=wanted)
        assert torch.equal(found, whole[0])
        assert torch.equal(one, whole[1 + ("hidden_states", "weight", "bias").index(wanted[0])])


def test_rounded_logits_are_an_unfused_models(isa):
    heads = inputs(33, 64, 64, 400, torch.bfloat16, magnitude=4.0)
    log_p, log_q = (
        (heads[f"{head}hidden_states"] @ heads[f"{head}weight"].t()).float().log_softmax(-1) for head in ("", "ref_")
    )
    expected = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    got = linear_kl(**heads, numerics="hf")
    exact = linear_kl(**{name: x if x is None else x.double() for name, x in heads.items()})
    assert (got - expected).abs().median() < 1e-6 * expected.median()
    assert (linear_kl(**heads) - exact).norm() < 0.01 * (got - exact).norm()


LENGTHS = [6, 11, 0, 17, 3]


def _problem(dtype):
    total = sum(LENGTHS)
    heads = inputs(total, 24, 16, 157, dtype)
    heads |= {"bias": None, "ref_bias": None}
    targets = torch.randint(157, (total,))
    targets[torch.rand(total) < 0.2] = -100
    now = linear_logprob(heads["hidden_states"].double(), heads["weight"].double(), targets).logprob.float()
    old = now - torch.tensor([-0.7, -0.05, 0.0, 0.05, 0.8])[torch.randint(5, (total,))]  # far from every bound
    return heads, targets, old, torch.randn(len(LENGTHS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["grpo", "dapo"])
def test_a_policy_loss_with_an_exact_kl_is_that_of_an_unfused_head(kind, dtype):
    """Both heads' logits in memory, F.kl_div and padded loops; as the README of the head shows the fused one."""
    heads, targets, old, advantages = _problem(dtype)
    mask = targets != -100

    def fused():
        hidden, weight = leaves(dtype, heads["hidden_states"], heads["weight"])
        found = linear_logprob(hidden, weight, targets)
        kl = linear_kl(hidden, weight, heads["ref_hidden_states"], heads["ref_weight"], kind="reverse", mask=mask)
        bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
        loss, metrics = policy_loss(
            found.logprob,
            old,
            advantages,
            bounds,
            normalizer=7.0,
            kind=kind,
            mask=mask,
            exact_kl=kl,
            kl_kind="exact",
            kl_coef=0.3,
        )
        loss.backward()
        torch.testing.assert_close(metrics["ref_kl_exact"], kl.detach()[mask].mean())
        return loss.detach(), hidden.grad, weight.grad

    def unfused(wide):
        hidden, weight = leaves(wide if wide is torch.float64 else dtype, heads["hidden_states"], heads["weight"])
        logits = hidden.to(wide) @ weight.to(wide).T
        logits.retain_grad()
        log_p = logits.log_softmax(-1)
        log_q = (heads["ref_hidden_states"].to(wide) @ heads["ref_weight"].to(wide).T).log_softmax(-1)
        rows = {
            "logprob": log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0],
            "old_logprob": old.to(wide),
            "ref_logprob": old.to(wide),
            "exact_kl": F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1),
        }
        rows = {name: plain.padded(value, LENGTHS) for name, value in rows.items()}
        options = {"kl_coef": 0.3, "kl_kind": "exact"}
        loss, _, size = plain.policy(rows, plain.padded(mask, LENGTHS), advantages.to(wide), 7.0, kind, **options)
        loss.backward()
        of_logits = logits.grad.abs()
        terms = (size, of_logits @ weight.detach().to(wide).abs(), of_logits.T @ hidden.detach().to(wide).abs())
        return (loss.detach(), hidden.grad, weight.grad), terms

    ours = fused()
    (theirs, _), (exact, terms) = (unfused(wide) for wide in (torch.float32, torch.float64))
    for name, *each in zip(("loss", "grad_hidden", "grad_weight"), ours, theirs, exact, terms, strict=True):
        assert_accurate(name, *each)

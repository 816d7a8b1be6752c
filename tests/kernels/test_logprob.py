"""linear_logprob: what is its own; what it shares with all operators is in ``test_operators.py``."""

from __future__ import annotations

import math

import pytest
import torch

import m4ov_kernels
from m4ov_kernels.head import linear_logprob, native_logprob, reference
from m4ov_kernels.head.logprob import raw

from . import strategies
from .numerics import EPS, gradients, leaves
from .operators import CASES, Call

OUTPUTS = ("logprob", "logsumexp", "entropy")
DEFAULTS = {"ignore_index": -100, "entropy": True, "numerics": "fp32", "temperature": 1.0, "num_valid": None}


def inputs(rows, width, vocab, dtype, bias=False, ignored=0.3, magnitude=1.0):
    hidden = strategies.tensor((rows, width), dtype, magnitude=magnitude)
    weight = strategies.tensor((vocab, width), dtype, magnitude=width**-0.5)
    targets = torch.randint(vocab, (rows,))
    targets[torch.rand(rows) < ignored] = -100
    return hidden, weight, targets, strategies.tensor((vocab,), dtype) if bias else None


def run(dtype, hidden, weight, targets, bias, grads, wanted=OUTPUTS, **options):
    """Outputs and the gradients of hidden states, weight and bias."""
    tensors = leaves(dtype, *(t for t in (hidden, weight, bias) if t is not None))
    found = linear_logprob(
        *tensors[:2], targets, bias=tensors[2] if bias is not None else None, entropy=True, **options
    )
    values = [getattr(found, name) for name in wanted]
    return [*values, *gradients(values, tensors, [grad.to(v.dtype) for grad, v in zip(grads, values, strict=True)])]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", strategies.HALF_AND_SINGLE)
@pytest.mark.parametrize(
    ("rows", "width", "vocab"), [(5, 8, 30), (1, 64, 97), (70, 33, 500), (130, 48, 1100), (66, 600, 193), (3, 1, 1)]
)
def test_against_float64(isa, rows, width, vocab, dtype, bias, temperature):
    hidden, weight, targets, bias = inputs(rows, width, vocab, dtype, bias)
    _judge(hidden, weight, targets, bias, temperature=temperature)


def _judge(hidden, weight, targets, bias=None, **options):
    """Results and gradients by the shared case's rule."""
    arguments = {"hidden_states": hidden, "weight": weight, "targets": targets, "bias": bias, **DEFAULTS, **options}
    wanted = tuple(name for name in ("hidden_states", "weight", "bias") if arguments[name] is not None)
    call = Call(arguments, {name: torch.randn(targets.shape) for name in OUTPUTS}, wanted)
    CASES["linear_logprob"].judge(call, CASES["linear_logprob"].evaluate(call))


@pytest.mark.parametrize("dtype", strategies.HALF_AND_SINGLE)
def test_a_row_keeps_its_bits(isa, dtype, monkeypatch):
    """In any company, at any place, on any number of threads, in chunks of any size: forward and hidden gradient."""
    hidden, weight, targets, bias = inputs(150, 72, 2000, dtype, bias=True)
    grads = [torch.randn(150) for _ in OUTPUTS]
    whole = run(dtype, hidden, weight, targets, bias, grads, invariant=True)
    threads = torch.get_num_threads()
    try:
        for count, budget, some in ((1, 1, 150), (2, 1 << 30, 1), (3, 1, 7), (2, 1, 64), (1, 1 << 30, 65), (2, 1, 149)):
            torch.set_num_threads(count)
            monkeypatch.setattr(native_logprob, "SCRATCH_BYTES", budget)
            chosen = torch.randperm(150)[:some]
            part = [x[chosen] for x in (hidden, targets)]
            got = run(dtype, part[0], weight, part[1], bias, [grad[chosen] for grad in grads], invariant=True)
            for name, ours, before in zip((*OUTPUTS, "grad"), got[:4], whole[:4], strict=True):
                assert torch.equal(ours, before[chosen]), (name, count, budget, some)
            if some == 150 and torch.equal(chosen, torch.arange(150)):
                assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", strategies.HALF_AND_SINGLE)
def test_the_likeliest_words(isa, dtype):
    hidden, weight, targets, bias = inputs(40, 24, 700, dtype, bias=True)
    bias[3] = bias[9] = bias.max() + 3  # often equal, if the weights are
    weight[9] = weight[3]
    found = linear_logprob(hidden, weight, targets, bias=bias, top_k_logprobs=5)
    with m4ov_kernels.backend("reference"):
        plain = linear_logprob(hidden, weight, targets, bias=bias, top_k_logprobs=5)
    assert torch.equal(found.top_indices, plain.top_indices)
    torch.testing.assert_close(found.top_logprobs, plain.top_logprobs, rtol=1e-5, atol=1e-5)
    kept = targets != -100
    best = found.top_indices[:, 0].masked_fill(~kept, -100)
    again = linear_logprob(hidden, weight, best, bias=bias)
    torch.testing.assert_close(again.logprob, found.top_logprobs[:, 0], rtol=0, atol=0)


def test_rounded_logits_are_an_unfused_models(isa):
    """To the bit, where the sums of both round to the same bf16."""
    hidden, weight, targets, _ = inputs(33, 64, 400, torch.bfloat16, ignored=0.0, magnitude=4.0)
    logits = hidden @ weight.t()
    expected = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    got = linear_logprob(hidden, weight, targets, numerics="hf").logprob
    exact = (hidden.double() @ weight.double().t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert (got - expected).abs().median() < 1e-6
    fp32 = linear_logprob(hidden, weight, targets).logprob
    assert (fp32 - exact).abs().max() < 1e-5 < (got - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_total_and_softcap(isa, dtype, softcap, weighted):
    hidden, weight, targets, bias = inputs(21, 16, 300, dtype, bias=True, magnitude=3.0)
    class_weight = torch.rand(300) if weighted else None

    def run_raw(dtype):
        tensors = leaves(dtype, hidden, weight, bias)
        found = raw(
            *tensors[:2], targets, bias=tensors[2], class_weight=class_weight, softcap=softcap, entropy=True, total=True
        )
        values = [found.logprob, found.entropy, found.total]
        return [*values, *gradients(values, tensors, [g.to(values[0].dtype) for g in grads])]

    grads = [torch.randn(21) for _ in range(3)]
    got = run_raw(dtype)
    with m4ov_kernels.backend("reference"):
        plain, exact = run_raw(dtype), run_raw(torch.float64)
    largest = float((hidden.double() @ weight.double().t() + bias.double()).abs().max())
    for name, ours, theirs, truth in zip(
        ("logprob", "entropy", "total", "hidden", "weight", "bias"), got, plain, exact, strict=True
    ):
        # As for unbounded logits (operators/head.py), in the norm of a whole tensor.
        allowed = 2 * (theirs.double() - truth).norm() + EPS[ours.dtype] * truth.norm()
        allowed += 2 * EPS[torch.float32] * (1 + largest) * truth.norm()
        assert (ours.double() - truth).norm() <= allowed, name


@pytest.mark.parametrize("magnitude", [1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outliers(isa, dtype, magnitude):
    hidden, weight, targets, _ = inputs(30, 16, 200, dtype, ignored=0.0, magnitude=magnitude)
    _judge(hidden, weight, targets)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_words_that_are_ruled_out(isa, backend):
    hidden, weight, targets, bias = inputs(9, 8, 60, torch.float32, bias=True, ignored=0.0)
    bias[10:50] = -math.inf
    targets %= 10
    with m4ov_kernels.backend(backend):
        values = run(torch.float32, hidden, weight, targets, bias, [torch.ones(9)] * 3)
    assert all(value.isfinite().all() for value in values)
    allowed = torch.cat([torch.arange(10), torch.arange(50, 60)])
    small = linear_logprob(hidden, weight[allowed], targets, bias=bias[allowed], entropy=True)
    torch.testing.assert_close(values[0], small.logprob)
    torch.testing.assert_close(values[2], small.entropy)


@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_far_temperatures(isa, temperature):
    hidden, weight, targets, _ = inputs(20, 16, 150, torch.float32, ignored=0.0)
    _judge(hidden, weight, targets, temperature=temperature)


def test_gradcheck_of_the_reference():
    hidden, weight, targets, bias = inputs(5, 4, 7, torch.float32, bias=True)
    tensors = leaves(torch.float64, hidden, weight, bias)

    def function(h, w, b):
        found = raw(h, w, targets, bias=b, temperature=0.7, softcap=3.0, entropy=True, total=True)
        return found[:4]

    with m4ov_kernels.backend("reference"):
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)


def test_the_definition_is_pytorchs():
    hidden, weight, targets, bias = inputs(12, 8, 40, torch.float32, bias=True, ignored=0.0)
    distribution = torch.distributions.Categorical(logits=(hidden @ weight.t() + bias) / 0.5)
    found = reference.linear_logprob(hidden, weight, targets, bias, None, 0.5, 0.0, -100, False, 0)
    torch.testing.assert_close(found.logprob, distribution.log_prob(targets))
    torch.testing.assert_close(found.entropy, distribution.entropy())

"""linear_cross_entropy: what is its own; what it shares with all operators is in ``test_operators.py``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import m4ov_kernels
from m4ov_kernels import linear_cross_entropy
from m4ov_kernels.head import native_logprob, state

from . import strategies
from .numerics import gradients, leaves
from .operators import CASES, Call


def inputs(rows, width, vocab, dtype, bias=False, ignored=0.3, magnitude=1.0):
    hidden = strategies.tensor((rows, width), dtype, magnitude=magnitude)
    weight = strategies.tensor((vocab, width), dtype, magnitude=width**-0.5)
    target = torch.randint(vocab, (rows,))
    target[torch.rand(rows) < ignored] = -100
    return hidden, weight, target, strategies.tensor((vocab,), dtype) if bias else None


def run(function, dtype, hidden, weight, target, bias, grad, **options):
    tensors = leaves(dtype, *(t for t in (hidden, weight, bias) if t is not None))
    loss = function(tensors[0], tensors[1], target, *tensors[2:], **options)
    return loss, *gradients(loss, tensors, [grad.to(loss.dtype)])


def ours(hidden, linear_weight, target, bias=None, **options):
    return linear_cross_entropy(hidden, linear_weight, target, linear_bias=bias, reduction="none", **options)


def plain(hidden, weight, target, bias=None, **options):
    logits = F.linear(hidden, weight, bias)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), target, reduction="none", **options)


def test_reductions_equal_pytorch():
    hidden, weight, target, _ = inputs(20, 16, 33, torch.float32)
    logits = F.linear(hidden, weight)
    for smoothing in (0.0, 0.2):
        for reduction in ("mean", "sum", "none"):
            for classes in (None, torch.rand(33)):
                options = {"reduction": reduction, "label_smoothing": smoothing, "weight": classes}
                expected = F.cross_entropy(logits, target, **options)
                torch.testing.assert_close(linear_cross_entropy(hidden, weight, target, **options), expected)
    items = torch.tensor(7)
    total = linear_cross_entropy(hidden, weight, target, reduction="sum")
    for value in (7, items):
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, target, num_items_in_batch=value), total / 7)
    shaped = linear_cross_entropy(hidden.view(4, 5, 16), weight, target.view(4, 5), reduction="none")
    assert shaped.shape == (4, 5)
    assert shaped.dtype == torch.float32


def test_penalty_and_cap():
    hidden, weight, target, _ = inputs(20, 16, 33, torch.float32)
    kept = target != -100
    logits = 2.0 * torch.tanh(F.linear(hidden, weight) / 2.0)
    penalty = 0.3 * logits.logsumexp(-1).square() * kept
    rows = F.cross_entropy(logits, target, reduction="none") + penalty
    for reduction, expected in (("none", rows), ("sum", rows.sum()), ("mean", rows.sum() / kept.sum())):
        got = linear_cross_entropy(hidden, weight, target, z_loss=0.3, softcap=2.0, reduction=reduction)
        torch.testing.assert_close(got, expected)
    classes = torch.rand(33)
    expected = F.cross_entropy(logits, target, classes) + penalty.sum() / kept.sum()
    got = linear_cross_entropy(hidden, weight, target, weight=classes, z_loss=0.3, softcap=2.0)
    torch.testing.assert_close(got, expected)


def test_rounded_logits_by_default():
    """In bf16 the loss of an unfused model, which is not that of float32 logits."""
    hidden, weight, target, _ = inputs(64, 96, 400, torch.bfloat16, ignored=0.0, magnitude=4.0)
    unfused, exact = plain(hidden, weight, target), plain(hidden.double(), weight.double(), target)
    assert (ours(hidden, weight, target) - unfused).abs().median() < 1e-5 < (unfused - exact).abs().median()
    assert (ours(hidden, weight, target, numerics="fp32") - exact).abs().max() < 1e-4


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_float16_gradients_past_its_end_in_the_middle_of_a_sum(isa, smoothing, monkeypatch):
    """Chunks of the vocabulary whose shares of a gradient pass 65504 and cancel: they are summed in float32."""
    monkeypatch.setattr(native_logprob, "SCRATCH_BYTES", 1)
    hidden, weight, target, _ = inputs(8, 4, 1000, torch.float16, ignored=0.0)
    weight[:500], weight[500:] = 120.0, -120.0
    weight += torch.randn(1000, 4).half()
    weight[7], target[:] = 0.0, 7
    hidden.mul_(1e-5)
    arguments = {"input": hidden, "linear_weight": weight, "target": target, "linear_bias": None, "weight": None}
    arguments |= {"ignore_index": -100, "label_smoothing": smoothing, "z_loss": 0.0, "softcap": None}
    arguments |= {"reduction": "none", "num_items_in_batch": None, "num_valid": None, "numerics": "hf"}
    call = Call(arguments, {"loss": torch.full((8,), 2000.0)}, ("input", "linear_weight"))
    got = CASES["linear_cross_entropy"].evaluate(call)
    assert got["grad_input"].isfinite().all()
    CASES["linear_cross_entropy"].judge(call, got)


def test_no_rows_and_nothing_but_ignored_rows():
    weight = torch.randn(9, 4, requires_grad=True)
    for rows in (0, 5):
        hidden = torch.randn(rows, 4, requires_grad=True)
        target = torch.full((rows,), -100)
        assert linear_cross_entropy(hidden, weight, target).isnan()
        loss = linear_cross_entropy(hidden, weight, target, reduction="sum")
        loss.backward()
        assert loss == 0
        assert not weight.grad.any()
        assert hidden.grad.shape == (rows, 4)
        assert not hidden.grad.any()


def test_frozen_head_and_frozen_body():
    hidden, weight, target, _ = inputs(11, 8, 30, torch.float32)
    full = run(ours, torch.float32, hidden, weight, target, None, torch.ones(11))
    for frozen in (0, 1):
        tensors = [t.detach().requires_grad_(i != frozen) for i, t in enumerate((hidden, weight))]
        ours(*tensors, target).sum().backward()
        assert tensors[frozen].grad is None
        torch.testing.assert_close(tensors[1 - frozen].grad, full[2 - frozen])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_ignored_rows_never_reach_the_result(isa, backend):
    hidden, weight, target, _ = inputs(16, 8, 30, torch.float32)
    target[3] = -100
    poison = hidden.clone()
    poison[target == -100] = torch.nan
    grad = torch.ones(16)
    with m4ov_kernels.backend(backend):
        clean = run(ours, torch.float32, hidden, weight, target, None, grad)
        dirty = run(ours, torch.float32, poison, weight, target, None, grad)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


def test_nan_and_infinite_logits_propagate(isa):
    hidden, weight, target, _ = inputs(4, 8, 30, torch.float32, ignored=0.0)
    hidden[1, 0] = torch.nan
    hidden[2, 0] = torch.inf
    loss = ours(hidden, weight, target)
    assert loss[1].isnan()
    assert loss[2].isnan()
    torch.testing.assert_close(loss[[0, 3]], plain(hidden, weight, target)[[0, 3]])


def test_bits_do_not_depend_on_threads(isa):
    hidden, weight, target, _ = inputs(64, 32, 700, torch.bfloat16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(ours, torch.bfloat16, hidden, weight, target, None, torch.ones(64)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("numerics", ["hf", "fp32"])
@pytest.mark.parametrize("dtype", strategies.HALF_AND_SINGLE)
def test_kept_logits_change_no_bit_and_survive_a_backward(isa, monkeypatch, dtype, numerics):
    monkeypatch.setattr(native_logprob, "SCRATCH_BYTES", 1)
    hidden, weight, target, bias = inputs(21, 24, 700, dtype, bias=True)
    again = run(ours, dtype, hidden, weight, target, bias, torch.ones(21), keep_logits_bytes=0, numerics=numerics)
    for kept in (64 * 200 * 4, 1 << 20):  # some; all
        tensors = leaves(dtype, hidden, weight, bias)
        loss = ours(tensors[0], tensors[1], target, tensors[2], keep_logits_bytes=kept, numerics=numerics)
        for _ in range(2):
            grads = torch.autograd.grad(loss.sum(), tensors, retain_graph=True)
            for a, b in zip(again, (loss, *grads), strict=True):
                assert torch.equal(a, b)


def test_logits_are_kept_as_far_as_they_are_wanted_and_only_for_a_backward(monkeypatch):
    hidden, weight, target, _ = inputs(70, 8, 300, torch.bfloat16, ignored=0.0)
    rooms, real = [], state.room_for_logits

    def room(*arguments):
        made = real(*arguments)
        rooms.append(made.nbytes)
        return made

    monkeypatch.setattr(state, "room_for_logits", room)
    learning = hidden.clone().requires_grad_()
    whole = 128 * 300 * 2  # in blocks of 64 tokens
    for wanted in (0, 1000, whole, 10**9):
        ours(learning, weight, target, keep_logits_bytes=wanted)
    ours(learning, weight, target, keep_logits_bytes=10**9, numerics="fp32")
    ours(learning, weight, target, keep_logits_bytes=10**9, num_valid=64)
    assert rooms == [0, 1000, whole, whole, 2 * whole, whole // 2]
    rooms.clear()
    monkeypatch.setattr("m4ov_kernels.head.cross_entropy.FEW_BYTES", whole // 2)
    ours(learning, weight, target)  # too many
    ours(learning, weight, target, num_valid=64)
    target[:10] = -100
    ours(learning, weight, target)
    ours(learning, weight, target, numerics="fp32")
    assert rooms == [0, whole // 2, whole // 2, 0]
    rooms.clear()
    ours(hidden, weight, target, keep_logits_bytes=10**9)
    with torch.no_grad():
        ours(learning, weight, target, keep_logits_bytes=10**9)
    assert rooms == [0, 0]


OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.2, "softcap": 3.0, "numerics": "fp32", "keep_logits_bytes": 1 << 16}


@pytest.mark.parametrize("num_items", [None, 7])
def test_every_option_at_once_under_compile(num_items):
    hidden, weight, target, bias = inputs(30, 16, 90, torch.float32, bias=True)
    classes = torch.rand(90)

    def function(hidden, weight, bias):
        given = {"linear_bias": bias, "weight": classes, "num_items_in_batch": num_items}
        return linear_cross_entropy(hidden, weight, target, **given, **OPTIONS)

    compiled, results = torch.compile(function, fullgraph=True, backend="aot_eager"), []
    for call in (function, compiled):
        tensors = leaves(torch.float32, hidden, weight, bias)
        loss = call(*tensors)
        results.append([loss, *torch.autograd.grad(loss, tensors)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck_of_the_reference():
    hidden, weight, target, bias = inputs(5, 4, 7, torch.float32, bias=True)
    tensors = leaves(torch.float64, hidden, weight, bias)
    with m4ov_kernels.backend("reference"):
        for options in ({"label_smoothing": 0.1}, {**OPTIONS, "weight": torch.rand(7)}):
            assert torch.autograd.gradcheck(lambda h, w, b, o=options: ours(h, w, target, b, **o), tensors)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_target_out_of_range_names_the_first_position(backend):
    hidden, weight, target, _ = inputs(6, 4, 10, torch.float32)
    target[3], target[5] = 10, -1
    with pytest.raises(ValueError, match=r"target\[3\] is 10: expected ignore_index \(-100\) or 0 ≤ target < 10"):  # noqa: SIM117
        with m4ov_kernels.backend(backend):
            linear_cross_entropy(hidden, weight, target)
    with pytest.raises(ValueError, match=r"target\[3\]"):
        torch.compile(linear_cross_entropy, backend="eager")(hidden, weight, target)
    assert linear_cross_entropy(hidden, weight, target.clamp(-1, 9), ignore_index=-1).isfinite()


def test_an_infinite_logit_of_the_target_with_label_smoothing():
    """Its loss is infinite, not the NaN of one infinity less another."""
    hidden, weight = torch.ones(1, 4), torch.randn(9, 4)
    weight[2, 1] = -torch.inf
    target = torch.tensor([2])
    assert ours(hidden, weight, target, label_smoothing=0.1) == plain(hidden, weight, target, label_smoothing=0.1)


def test_the_loss_is_a_scalar_whatever_the_shape_of_the_count():
    hidden, weight, target, _ = inputs(6, 4, 10, torch.float32)
    assert linear_cross_entropy(hidden, weight, target, num_items_in_batch=torch.tensor([3])).shape == ()

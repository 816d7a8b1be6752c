"""linear_cross_entropy: what is its own; what it shares with all operators is in ``test_operators.py``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import m4ov_kernels
from m4ov_kernels import linear_cross_entropy
from m4ov_kernels.head import chunked, reference

from . import strategies
from .numerics import gradients, leaves


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


def ours(hidden, weight, target, bias=None, **options):
    return linear_cross_entropy(hidden, weight, target, linear_bias=bias, reduction="none", **options)


def plain(hidden, weight, target, bias=None, label_smoothing=0.0, ignore_index=-100):
    return reference.linear_cross_entropy(hidden, weight, target, bias, ignore_index, label_smoothing)


def test_reductions_equal_pytorch():
    hidden, weight, target, _ = inputs(20, 16, 33, torch.float32)
    for smoothing in (0.0, 0.2):
        for reduction in ("mean", "sum", "none"):
            expected = F.cross_entropy(F.linear(hidden, weight), target, reduction=reduction, label_smoothing=smoothing)
            got = linear_cross_entropy(hidden, weight, target, reduction=reduction, label_smoothing=smoothing)
            torch.testing.assert_close(got, expected)
    items = torch.tensor(7)
    total = linear_cross_entropy(hidden, weight, target, reduction="sum")
    for value in (7, items):
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, target, num_items_in_batch=value), total / 7)
    shaped = linear_cross_entropy(hidden.view(4, 5, 16), weight, target.view(4, 5), reduction="none")
    assert shaped.shape == (4, 5)
    assert shaped.dtype == torch.float32


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


@pytest.mark.parametrize("dtype", strategies.HALF_AND_SINGLE)
def test_kept_logits_change_no_bit_and_survive_a_backward(isa, monkeypatch, dtype):
    monkeypatch.setattr(chunked, "CPU_COLUMNS", 128)
    hidden, weight, target, bias = inputs(21, 24, 700, dtype, bias=True)
    rows = int((target != -100).sum())
    again = run(ours, dtype, hidden, weight, target, bias, torch.ones(21), keep_logits_bytes=0)
    for kept in (rows * 128 * hidden.element_size(), 1 << 20):  # one chunk of six; all
        tensors = leaves(dtype, hidden, weight, bias)
        loss = ours(tensors[0], tensors[1], target, tensors[2], keep_logits_bytes=kept)
        for _ in range(2):
            grads = torch.autograd.grad(loss.sum(), tensors, retain_graph=True)
            for a, b in zip(again, (loss, *grads), strict=True):
                assert torch.equal(a, b)


def test_logits_are_kept_as_far_as_they_are_wanted_and_only_for_a_backward(monkeypatch):
    monkeypatch.setattr(chunked, "CPU_COLUMNS", 128)
    hidden, weight, target, _ = inputs(10, 8, 300, torch.float32)
    target[:] = torch.arange(10)
    chunk = 10 * 128 * 4
    project = chunked._project
    projected = []
    monkeypatch.setattr(chunked, "_project", lambda *a: projected.append(a[3]) or project(*a))

    def kept(wanted):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
            loss = ours(hidden.requires_grad_(), weight, target, keep_logits_bytes=wanted).sum()
        projected.clear()
        loss.backward()
        assert saved[-1] <= wanted
        return 3 - len(projected)

    assert [kept(wanted) for wanted in (0, chunk - 1, chunk, 2 * chunk, 10**9)] == [0, 0, 1, 2, 3]
    rooms = []
    monkeypatch.setattr(chunked, "room_for_logits", lambda *a: rooms.append(a[-1]) or 0)
    with torch.no_grad():
        ours(hidden, weight, target)
    ours(hidden.detach(), weight, target)
    assert rooms == [0, 0]


def test_gradcheck_of_the_reference():
    hidden, weight, target, bias = inputs(5, 4, 7, torch.float32, bias=True)
    tensors = leaves(torch.float64, hidden, weight, bias)
    with m4ov_kernels.backend("reference"):
        assert torch.autograd.gradcheck(lambda h, w, b: ours(h, w, target, b, label_smoothing=0.1), tensors)


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

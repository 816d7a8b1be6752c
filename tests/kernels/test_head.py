"""linear_cross_entropy: native epilogues on every ISA against float64; the contract's other points."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import m4ov_kernels
from m4ov_kernels import linear_cross_entropy
from m4ov_kernels.head import chunked, native, reference

from . import strategies
from .numerics import assert_accurate, gradients, leaves


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


def gradient_terms(hidden, weight, target, bias, grad):
    """What nearly cancels, in float64: in the loss the largest logit; in a gradient the softmax, which moves by
    p · |logit| · eps when logits are rounded, and the target's share, times the other factor."""
    hidden, weight = hidden.double(), weight.double()
    keep = target != -100
    logits = F.linear(hidden, weight, None if bias is None else bias.double())
    largest = logits.abs().amax(-1)
    shares = logits.softmax(-1) * (1 + largest)[:, None] + F.one_hot(target.clamp(min=0), weight.shape[0])
    shares = shares * (keep * grad.double())[:, None]
    return {
        "loss": largest * keep,
        "grad_input": shares @ weight.abs(),
        "grad_weight": shares.t() @ hidden.abs(),
        "grad_bias": shares.sum(0),
    }


@given(
    rows=st.integers(0, 40),
    width=st.sampled_from((1, 3, 16, 65, 128)),
    vocab=st.sampled_from((1, 2, 17, 64, 100, 333)),
    chunk=st.sampled_from((7, 64, 1000)),
    dtype=strategies.dtypes,
    bias=st.booleans(),
    ignored=st.sampled_from((0.0, 0.5, 1.0)),
    label_smoothing=st.sampled_from((0.0, 0.1, 1.0)),
    magnitude=st.sampled_from((1.0, 20.0)),
    kept=st.sampled_from((None, 0, 5000)),
)
@settings(max_examples=60)
def test_native_forward_and_gradients(
    isa, rows, width, vocab, chunk, dtype, bias, ignored, label_smoothing, magnitude, kept
):
    hidden, weight, target, linear_bias = inputs(rows, width, vocab, dtype, bias, ignored, magnitude)
    grad = torch.rand(rows) + 0.5
    arguments = hidden, weight, target, linear_bias, grad
    with pytest.MonkeyPatch.context() as patch, m4ov_kernels.backend("native"):
        patch.setattr(chunked, "CPU_COLUMNS", chunk)
        got = run(ours, dtype, *arguments, label_smoothing=label_smoothing, keep_logits_bytes=kept)
    baseline = run(plain, dtype, *arguments, label_smoothing=label_smoothing)
    exact = run(plain, torch.float64, *arguments, label_smoothing=label_smoothing)
    names = ("loss", "grad_input", "grad_weight", "grad_bias")[: 3 + bias]
    terms = gradient_terms(*arguments)
    for name, *tensors in zip(names, got, baseline, exact, strict=True):
        assert_accurate(name, *tensors, terms.get(name))


@pytest.mark.parametrize("dtype", strategies.HALF_AND_SINGLE)
def test_every_element_of_preallocated_outputs_is_written(isa, dtype):
    hidden, weight, target, bias = inputs(13, 24, 50, dtype, bias=True)
    rows = int((target != -100).sum())
    out = torch.full((13,), torch.nan), torch.full((13, 2), torch.nan), hidden.new_full((13 * 50,), torch.nan)
    native.linear_cross_entropy_fwd(hidden, weight, target, bias, -100, 0.1, None, 1 << 20, out=out)
    assert not out[0].isnan().any()
    assert not out[1][target != -100].isnan().any()
    assert not out[2][: rows * 50].isnan().any()
    grads = [torch.full_like(tensor, torch.nan) for tensor in (hidden, weight, bias)]
    ones = torch.ones(13)
    native.linear_cross_entropy_bwd(
        ones, hidden, weight, target, bias, *out[1:], -100, 0.1, None, True, True, True, out=grads
    )
    assert not any(tensor.isnan().any() for tensor in grads)
    assert not grads[0][target == -100].any()


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


def test_ignored_rows_cost_nothing_and_never_reach_the_result(isa):
    hidden, weight, target, _ = inputs(16, 8, 30, torch.float32)
    target[3] = -100
    poison = hidden.clone()
    poison[target == -100] = torch.nan
    grad = torch.ones(16)
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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.ones(5, 4).int()}, TypeError, "input must be a bfloat16"),
        ({"target": torch.ones(5)}, TypeError, "target must be an int64 tensor of class indices; got float32"),
        ({"target": torch.ones(5, 10)}, TypeError, "target must be an int64 tensor"),
        ({"target": torch.ones(4).long()}, ValueError, r"target must be \[5\], as input's rows; got \[4\]"),
        ({"linear_weight": torch.ones(10, 5)}, ValueError, r"linear_weight must be \[V, 4\]"),
        ({"linear_weight": torch.ones(0, 4)}, ValueError, r"linear_weight must be \[V, 4\] with V at least 1"),
        ({"linear_weight": torch.ones(10, 4, device="meta")}, ValueError, "linear_weight must be on cpu"),
        ({"linear_bias": torch.ones(9)}, ValueError, r"linear_bias must be \[10\]; got \[9\]"),
        ({"weight": torch.ones(10)}, ValueError, r"weight must be None \(class weights are not supported yet\)"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int"),
        ({"reduction": "average"}, ValueError, "reduction must be one of 'mean', 'sum', 'none'"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0 and 1"),
        ({"num_items_in_batch": 0}, ValueError, "num_items_in_batch must be greater than 0"),
        ({"num_items_in_batch": 3, "reduction": "sum"}, ValueError, "num_items_in_batch must be None unless"),
        ({"num_items_in_batch": torch.ones(2)}, ValueError, "num_items_in_batch must be a number or a tensor with"),
        (
            {"keep_logits_bytes": -1},
            ValueError,
            "keep_logits_bytes must be a number of bytes, 0 or more, or None; got -1",
        ),
        ({"num_valid": 6}, ValueError, "num_valid must be between 0 and the 5 rows; got 6"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"input": torch.ones(5, 4), "linear_weight": torch.ones(10, 4), "target": torch.ones(5).long()}
    with pytest.raises(error, match="linear_cross_entropy: " + message):
        linear_cross_entropy(**(arguments | change))

"""``linear_logprob`` in Triton against float64; see ``test_triton.py``."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import m4ov_kernels
from m4ov_kernels import configs
from m4ov_kernels.head import linear_logprob, reference
from m4ov_kernels.head import triton as head
from m4ov_kernels.head import triton_logprob_launches as launches
from m4ov_kernels.head.logprob import raw

from . import strategies
from .numerics import EPS, assert_accurate, gradients, leaves, logit_terms
from .operators.head import LINEAR_LOGPROB
from .triton_blocks import DEVICE, DTYPES, dtypes, on_device, row, small_blocks, tensor

__all__ = ["small_blocks"]  # a fixture of every test here
FOUND = ("logprob", "logsumexp", "entropy", "total")
IGNORE = -100


def inputs(rows, width, vocab, dtype, layout="contiguous", ignored=0.3, bias=False, magnitude=1.0):
    hidden = tensor((rows, width), dtype, layout, magnitude)
    weight = tensor((vocab, width), dtype, layout, width**-0.5)
    targets = torch.randint(vocab, (rows,), device=DEVICE)
    targets[torch.rand(rows, device=DEVICE) < ignored] = IGNORE
    return hidden, weight, targets, tensor((vocab,), dtype) if bias else None


def poison(shape, dtype):
    return torch.full(shape, torch.nan if dtype.is_floating_point else -7, dtype=dtype, device=DEVICE)


def by_kernels(
    hidden, weight, targets, bias, class_weight, grads, *, temperature=1.0, softcap=0.0, known=False, rounded=False
):
    """``FOUND``, the normalizer and the gradients, into memory full of NaN."""
    num_valid = int((targets != IGNORE).sum()) if known else None
    given_tensors = (hidden, weight, targets, bias, class_weight)
    common = (temperature, softcap, IGNORE, num_valid, rounded)
    more = (True, True, 0, 0, weight.shape[0], 0)
    count = len(targets)
    shapes = ((count,), (count,), (count,), (count,), (count, 0), (count, 0), (2, count), (0,))
    dtypes = (
        *[torch.float32] * 5,
        torch.int64,
        torch.float32,
        hidden.dtype if rounded and not softcap else torch.float32,
    )
    out = [poison(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    found = head.linear_logprob_fwd(*given_tensors, *common, *more, out=tuple(out))
    assert all(a is b for a, b in zip(out, found, strict=True))
    saved = (found[6], found[2], found[7])
    wanted = (0, weight.shape[0], True, True, bias is not None)
    out = [poison(t.shape, t.dtype) for t in (hidden, weight, hidden.new_empty(0) if bias is None else bias)]
    return [*found[:4], *head.linear_logprob_bwd(*given_tensors, *saved, *grads, *common, *wanted, out=tuple(out))]


def by_definition(dtype, hidden, weight, targets, bias, class_weight, grads, temperature, softcap, rounded):
    tensors = leaves(dtype, *(t for t in (hidden, weight, bias) if t is not None))
    of_bias = tensors[2] if bias is not None else None
    found = reference.linear_logprob(
        *tensors[:2], targets, of_bias, class_weight, temperature, softcap, IGNORE, rounded, 0
    )[:4]
    return [*found, *gradients(found, tensors, [grad.to(found[0].dtype) for grad in grads])]


def terms_of(hidden, weight, targets, bias, class_weight, grads, temperature, softcap):
    """What cancels, in float64: products in a logit; logits in a log-probability and in a total; in the gradients the
    shares of the softmax and of the target, times the other factor, rounded to the dtype before the products are
    taken."""
    sizes = logit_terms(hidden, weight, bias) / temperature
    hidden, weight = hidden.double(), weight.double()
    logits = hidden @ weight.t() + (0.0 if bias is None else bias.double())
    logits = logits / temperature
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
        sizes = torch.maximum(sizes * (1 - (logits / softcap).square()), logits.abs())
    log_p = logits.log_softmax(-1).clamp_min(-1e6)
    kept = (targets != IGNORE)[:, None]
    of = [grad.double().abs()[:, None] for grad in grads]
    p = log_p.exp()
    shares = p * (of[0] + of[1] + of[2] * (log_p.abs() + (p * log_p).sum(-1, keepdim=True).abs()))
    shares = shares.scatter_add(1, targets.clamp(min=0)[:, None], of[0])
    shares = (shares + of[3] * (1.0 if class_weight is None else class_weight.double())) * kept / temperature
    counted = 1.0 if class_weight is None else class_weight.double()
    return {
        "logprob": sizes.amax(-1) * kept[:, 0],
        "logsumexp": sizes.amax(-1) * kept[:, 0],
        "total": (sizes * counted).sum(-1) * kept[:, 0],
        "grad_hidden_states": shares @ weight.abs(),
        "grad_weight": shares.t() @ hidden.abs(),
        "grad_bias": shares.sum(0),
    }


@given(
    rows=st.integers(0, 33),
    width=st.sampled_from((1, 16, 33, 64)),
    vocab=st.sampled_from((1, 31, 64, 150)),
    dtype=dtypes,
    layout=strategies.layouts,
    bias=st.booleans(),
    weighted=st.booleans(),
    ignored=st.sampled_from((0.0, 0.5, 1.0)),
    temperature=st.sampled_from((1.0, 0.6)),
    softcap=st.sampled_from((0.0, 2.0)),
    known=st.booleans(),
)
@settings(max_examples=14, deadline=None)
def test_against_float64(rows, width, vocab, dtype, layout, bias, weighted, ignored, temperature, softcap, known):
    hidden, weight, targets, bias = inputs(rows, width, vocab, dtype, layout, ignored, bias)
    class_weight = torch.rand(vocab, device=DEVICE) if weighted else None
    grads = [torch.randn(rows, device=DEVICE) for _ in FOUND]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "_CHUNK_WORDS", 64)
        patch.setattr(launches, "GPU_CHUNK_BYTES", 0)
        options = {"temperature": temperature, "softcap": softcap}
        got = by_kernels(hidden, weight, targets, bias, class_weight, grads, known=known, **options)
    m4ov_kernels.check()
    arguments = (hidden, weight, targets, bias, class_weight, grads, temperature, softcap)
    plain, exact = (by_definition(d, *arguments, False) for d in (dtype, torch.float64))
    terms = terms_of(*arguments)
    names = (*FOUND, "grad_hidden_states", "grad_weight", "grad_bias")
    for name, ours, theirs, truth in zip(names, got, plain, exact, strict=False):
        assert_accurate(name, ours, theirs, truth, terms.get(name))


# Tiles that hold most of the shared cases whole.
LARGE = [
    row(f"linear_logprob_{kind}{tiles}", None, BLOCK_T=64, BLOCK_V=128, BLOCK_D=128, GROUP=2, **more)
    for kind, more in (("fwd", {"TILES": 1}), ("bwd", {}))
    for tiles in ("", "_descriptors", "_wide")
]


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_the_shared_cases(data):
    """As they draw and judge them for every implementation, infinite and huge values too."""
    call = data.draw(strategies.drawn(LINEAR_LOGPROB.call))
    if LINEAR_LOGPROB.kernel_dtype(call.arguments) not in DTYPES:
        return
    call = on_device(call)
    with configs.override(*LARGE), m4ov_kernels.backend("triton"):
        got = LINEAR_LOGPROB.evaluate(call)
    m4ov_kernels.check()
    LINEAR_LOGPROB.judge(call, got)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("bias", [False, True])
def test_rounded_logits(bias, temperature):
    """As an unfused model has them: both round the same sums, but for a few that end beside a boundary."""
    hidden, weight, targets, bias = inputs(20, 64, 100, torch.float16, ignored=0.0, bias=bias, magnitude=4.0)
    grads = [torch.randn(20, device=DEVICE) for _ in FOUND]
    got = by_kernels(hidden, weight, targets, bias, None, grads, temperature=temperature, rounded=True)
    arguments = (hidden, weight, targets, bias, None, grads, temperature, 0.0)
    plain, exact = (by_definition(d, *arguments, True) for d in (torch.float16, torch.float64))
    names, terms = (*FOUND, "grad_hidden_states", "grad_weight", "grad_bias"), terms_of(*arguments)
    for name, ours, theirs, truth in zip(names, got, plain, exact, strict=False):
        assert_accurate(name, ours, theirs, truth, terms.get(name))
    assert (got[0] - plain[0]).abs().median() < 1e-6
    unrounded = by_kernels(hidden, weight, targets, bias, None, grads, temperature=temperature)
    assert (unrounded[0] - exact[0]).abs().max() < 2e-5 < (got[0] - exact[0]).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_likeliest_words(dtype):
    hidden, weight, targets, bias = inputs(20, 24, 150, dtype, bias=True)
    weight[9] = weight[3] = weight[130]
    bias[3] = bias[9] = bias[130] = bias.max() + 30
    bias[50:] = -math.inf
    bias[130] = bias[9]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "_CHUNK_WORDS", 64)
        patch.setattr(launches, "GPU_CHUNK_BYTES", 0)
        with m4ov_kernels.backend("triton"):
            found = linear_logprob(hidden, weight, targets, bias=bias, top_k_logprobs=5)
            all_words = linear_logprob(hidden, weight, targets, bias=bias, top_k_logprobs=150)
    with m4ov_kernels.backend("reference"):
        plain = linear_logprob(hidden.double(), weight.double(), targets, bias=bias.double(), top_k_logprobs=150)
    kept = targets != IGNORE
    assert found.top_indices[kept, :3].tolist() == [[3, 9, 130]] * int(kept.sum())
    assert torch.equal(all_words.top_indices[:, :5], found.top_indices)
    assert torch.equal(all_words.top_indices.sort().values, plain.top_indices.sort().values)
    torch.testing.assert_close(all_words.top_logprobs.double(), plain.top_logprobs, rtol=1e-5, atol=1e-5)
    best = found.top_indices[:, 1].masked_fill(~kept, IGNORE)
    with m4ov_kernels.backend("triton"):
        again = linear_logprob(hidden, weight, best, bias=bias)
    torch.testing.assert_close(again.logprob, found.top_logprobs[:, 1], rtol=0, atol=1e-6)


def test_bfloat16_forward():
    """Only its results, which are float32: the interpreter's bfloat16 stores truncate."""
    hidden, weight, targets, bias = inputs(20, 64, 150, torch.bfloat16, bias=True)
    with m4ov_kernels.backend("triton"):
        found = linear_logprob(hidden, weight, targets, bias=bias, entropy=True, temperature=0.7)
    with m4ov_kernels.backend("reference"):
        wide = (hidden.double(), weight.double(), targets)
        exact = linear_logprob(*wide, bias=bias.double(), entropy=True, temperature=0.7)
    for name in ("logprob", "logsumexp", "entropy"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(exact, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_valid", [None, 5, 6])
def test_a_target_out_of_range_is_nan_and_found_by_check(num_valid):
    hidden, weight = leaves(torch.float32, tensor((6, 8), torch.float32), tensor((40, 8), torch.float32))
    targets = torch.tensor([3, IGNORE, 40, 39, -1, 0], device=DEVICE)
    wrong = [False, False, True, False, True, False]
    with m4ov_kernels.backend("triton"):
        found = linear_logprob(hidden, weight, targets, entropy=True, top_k_logprobs=2, num_valid=num_valid)
    for values in (found.logprob, found.logsumexp, found.entropy, found.top_logprobs[:, 0]):
        assert values.isnan().tolist() == wrong
        assert values[1] == 0
    with pytest.raises(ValueError, match=r"linear_logprob: targets\[2\] is neither ignore_index nor in \[0, vocab"):
        m4ov_kernels.check()
    m4ov_kernels.check()  # told once
    grads = torch.autograd.grad(found.logprob.nan_to_num().sum(), (hidden, weight))
    assert grads[0].isnan().any(-1).tolist() == wrong


def test_rows_beyond_num_valid_are_nan_and_too_large_a_count_is_harmless():
    hidden, weight = tensor((5, 8), torch.float32).requires_grad_(), tensor((40, 8), torch.float32)
    targets = torch.tensor([3, IGNORE, 7, 39, 1], device=DEVICE)
    exact = reference.linear_logprob(hidden, weight, targets, None, None, 1.0, 0.0, IGNORE, False, 0)
    for num_valid, left_out in ((5, []), (4, []), (2, [3, 4])):
        with m4ov_kernels.backend("triton"):
            found = linear_logprob(hidden, weight, targets, num_valid=num_valid, top_k_logprobs=1)
        assert found.logprob.isnan().nonzero().flatten().tolist() == left_out
        assert found.top_logprobs[:, 0].isnan().nonzero().flatten().tolist() == left_out
        torch.testing.assert_close(found.logprob.nan_to_num(), exact.logprob.masked_fill(found.logprob.isnan(), 0.0))
        grad = torch.autograd.grad(found.logprob.sum(), hidden)[0]
        assert grad.isnan().any(-1).nonzero().flatten().tolist() == left_out


@pytest.mark.parametrize("num_valid", [None, 6, 9])
def test_what_is_in_ignored_rows_reaches_nothing(num_valid):
    hidden, weight, _, bias = inputs(9, 16, 70, torch.float16, bias=True)
    targets = torch.tensor([3, IGNORE, 7, IGNORE, 1, 69, IGNORE, 0, 5], device=DEVICE)
    results = []
    for rest in (torch.nan, 1.0):
        tensors = leaves(torch.float16, hidden.masked_fill((targets == IGNORE)[:, None], rest), weight, bias)
        with m4ov_kernels.backend("triton"):
            found = linear_logprob(*tensors[:2], targets, bias=tensors[2], entropy=True, num_valid=num_valid)
        values = [found.logprob, found.logsumexp, found.entropy]
        results.append([*values, *gradients(values, tensors, [torch.ones_like(v) for v in values])])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
        assert first.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_words_that_are_ruled_out(dtype):
    hidden, weight, targets, bias = inputs(9, 16, 90, dtype, bias=True, ignored=0.0)
    bias[5:80] = -math.inf  # whole tiles and splits
    targets %= 5
    grads = [torch.full((9,), 3.0, device=DEVICE) for _ in FOUND[:3]] + [torch.zeros(9, device=DEVICE)]
    got = by_kernels(hidden, weight, targets, bias, None, grads)
    allowed = torch.cat([torch.arange(5), torch.arange(80, 90)]).to(DEVICE)
    small = by_definition(torch.float64, hidden, weight[allowed], targets, bias[allowed], None, grads, 1.0, 0.0, False)
    for index, truth in ((0, small[0]), (1, small[1]), (2, small[2]), (4, small[4]), (5, small[5])):
        ours = got[index][allowed] if index == 5 else got[index]
        torch.testing.assert_close(ours.double(), truth, rtol=20 * EPS[dtype], atol=20 * EPS[dtype])
    assert (got[5][5:80] == 0).all()
    assert (got[6][5:80] == 0).all()


def test_a_shard_knows_its_own_words_only():
    hidden, weight, targets, bias = inputs(20, 16, 96, torch.float16, bias=True, ignored=0.2)
    options = (1.0, 0.0, IGNORE, None, False, True, True, 3)
    whole = head.linear_logprob_fwd(hidden, weight, targets, bias, None, *options, 0, 96, 0)
    parts = [
        head.linear_logprob_fwd(hidden, weight[rows], targets, bias[rows], None, *options, rows.start, 96, 0)
        for rows in (slice(0, 48), slice(48, 96))
    ]
    kept = targets != IGNORE
    logsumexp = torch.logaddexp(parts[0][1], parts[1][1])
    torch.testing.assert_close(logsumexp.masked_fill(~kept, 0.0), whole[1])
    back = torch.where(targets < 48, parts[0][1] - whole[1], parts[1][1] - whole[1]).masked_fill(~kept, 0.0)
    torch.testing.assert_close(parts[0][0] + parts[1][0] + back, whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts[0][3] + parts[1][3], whole[3], rtol=1e-4, atol=1e-4)
    assert parts[1][5][kept].min() >= 48 > parts[0][5].max()
    grads = [torch.randn(20, device=DEVICE), None, None, None]
    rest = (*options[:5], 48, 96, True, True, True)
    saved = [parts[1][i] for i in (6, 2, 7)]
    got = head.linear_logprob_bwd(hidden, weight[48:], targets, bias[48:], None, *saved, *grads, *rest)
    here = kept & (targets >= 48)
    local = torch.where(here, targets - 48, IGNORE)
    expected = by_definition(torch.float64, hidden, weight[48:], local, bias[48:], None, [
        torch.where(here, grads[0], 0.0), *[torch.zeros(20, device=DEVICE)] * 3
    ], 1.0, 0.0, False)[4:]  # fmt: skip
    for ours, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-2, atol=1e-3)


def test_a_rows_results_do_not_depend_on_other_rows_or_on_the_machine():
    hidden, weight, targets, _ = inputs(40, 40, 100, torch.float16, ignored=0.0)
    chosen = torch.randperm(40)[:11].to(DEVICE)
    results = []
    for processors, rows in ((2, slice(None)), (5, slice(None)), (1, chosen)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launches, "_processors", lambda device, count=processors: count)
            with m4ov_kernels.backend("triton"):
                found = linear_logprob(hidden[rows], weight, targets[rows], entropy=True)
        results.append((found.logprob, found.logsumexp, found.entropy))
    for whole, other, some in zip(*results, strict=True):
        assert torch.equal(whole, other)
        assert torch.equal(whole[chosen], some)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_what_is_needed(needs):
    hidden, weight, targets, bias = inputs(9, 16, 70, torch.float32, bias=True)
    options = (1.0, 0.0, IGNORE, None, False)
    found = head.linear_logprob_fwd(hidden, weight, targets, bias, None, *options, False, False, 0, 0, 70, 0)
    saved, grads = (found[6], found[2], found[7]), (torch.randn(9, device=DEVICE), None, None, None)
    given_tensors = (hidden, weight, targets, bias, None, *saved, *grads, *options, 0, 70)
    whole = head.linear_logprob_bwd(*given_tensors, True, True, True)
    some = head.linear_logprob_bwd(*given_tensors, *needs)
    for need, one, other in zip(needs, whole, some, strict=True):
        assert torch.equal(other, one) if need else other.shape == (0,)


def test_outputs_of_the_wrong_shape_are_refused():
    hidden, weight, targets, _ = inputs(4, 8, 30, torch.float32)
    options = (1.0, 0.0, IGNORE, None, False)
    made = head.linear_logprob_fwd(hidden, weight, targets, None, None, *options, False, False, 0, 0, 30, 0)
    with pytest.raises(ValueError, match="out: expected a contiguous"):
        head.linear_logprob_fwd(
            hidden, weight, targets, None, None, *options, False, False, 0, 0, 30, 0, out=(made[0][:3], *made[1:])
        )


def test_autograd_through_the_front_door():
    tensors = [tensor(shape, torch.float32).requires_grad_() for shape in ((3, 9, 16), (70, 16), (70,))]
    targets = torch.randint(70, (3, 9), device=DEVICE)
    results = []
    for name in ("triton", "reference"):
        with m4ov_kernels.backend(name):
            options = {"softcap": 3.0, "temperature": 0.8, "entropy": True, "total": True, "keep_logits_bytes": 1 << 20}
            found = raw(tensors[0], tensors[1], targets, bias=tensors[2], **options)
        values: list[Tensor] = [found.logprob, found.logsumexp, found.entropy, found.total]
        loss = sum(value.square().mean() for value in values)
        results.append([loss, *torch.autograd.grad(loss, tensors)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)

"""``linear_kl`` in Triton against float64; see ``test_triton.py``."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import m4ov_kernels
from m4ov_kernels import configs
from m4ov_kernels.head import linear_kl
from m4ov_kernels.head import triton as head
from m4ov_kernels.head import triton_logprob_launches as launches

from . import strategies
from .numerics import assert_accurate, gradients, leaves, logit_terms
from .operators import Call
from .operators.head_kl import LINEAR_KL, terms
from .triton_blocks import DEVICE, DTYPES, dtypes, on_device, row, small_blocks, tensor

__all__ = ["small_blocks"]  # a fixture of every test here
KINDS = ("forward", "reverse", "jsd")


def inputs(rows, width, ref_width, vocab, dtype, layout="contiguous", bias=False):
    """Hidden states, weight, those of the reference, both biases."""
    heads = [
        values
        for dim in (width, ref_width)
        for values in (tensor((rows, dim), dtype, layout), tensor((vocab, dim), dtype, layout, dim**-0.5))
    ]
    return [*heads, *(tensor((vocab,), dtype) if bias else None for _ in range(2))]


def poison(*shape, dtype):
    return torch.full(shape, math.nan, dtype=dtype, device=DEVICE)


@given(
    rows=st.integers(0, 33),
    width=st.sampled_from((1, 16, 33, 64)),
    ref_width=st.sampled_from((1, 16, 40)),
    vocab=st.sampled_from((1, 31, 64, 150)),
    dtype=dtypes,
    layout=strategies.layouts,
    bias=st.booleans(),
    kept=st.sampled_from((None, 0.0, 0.6)),
    temperature=st.sampled_from((1.0, 0.6)),
    kind=st.sampled_from(KINDS),
    known=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_against_float64(rows, width, ref_width, vocab, dtype, layout, bias, kept, temperature, kind, known):
    """Into memory full of NaN, in several chunks."""
    tensors = inputs(rows, width, ref_width, vocab, dtype, layout, bias)
    mask = None if kept is None else torch.rand(rows, device=DEVICE) < kept
    num_valid = (rows if mask is None else int(mask.sum())) if known else None
    grad = torch.randn(rows, device=DEVICE)
    names = ("hidden_states", "weight", "ref_hidden_states", "ref_weight", "bias", "ref_bias")
    options = {"kind": kind, "temperature": temperature, "num_valid": num_valid}
    arguments = {**dict(zip(names, tensors, strict=True)), "mask": mask, "numerics": "fp32", **options}
    wanted = ("hidden_states", "weight", *["bias"] * bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "_CHUNK_WORDS", 64)
        patch.setattr(launches, "GPU_CHUNK_BYTES", 0)
        rest = (kind, temperature, num_valid, False)
        out = (poison(rows, dtype=torch.float32), poison(5, rows, dtype=torch.float32))
        found = head.linear_kl_fwd(*tensors, mask, *rest, out=out)
        assert all(a is b for a, b in zip(out, found, strict=True))
        of = [
            poison(*(arguments[name].shape if name in wanted else (0,)), dtype=dtype) for name in (*names[:2], "bias")
        ]
        given_tensors = (grad, *tensors, mask, found[1])
        got = [found[0], *head.linear_kl_bwd(*given_tensors, *rest, True, True, bias, out=tuple(of))]
    call = Call(arguments, {"divergence": grad}, wanted)
    with m4ov_kernels.backend("reference"):
        plain, exact = (LINEAR_KL.evaluate(call, d, LINEAR_KL.definition) for d in (None, torch.float64))
    cancels = terms(call)
    for name, ours in zip(("divergence", *(f"grad_{name}" for name in wanted)), got, strict=False):
        assert_accurate(name, ours, plain[name], exact[name], cancels[name])


# Tiles that hold most of the shared cases whole.
LARGE = [
    row(f"linear_kl_{kind}{tiles}", None, BLOCK_T=64, BLOCK_V=128, BLOCK_D=128, GROUP=2, **more)
    for kind, more in (("fwd", {"TILES": 1}), ("bwd", {}))
    for tiles in ("", "_wide", "_descriptors", "_descriptors_wide")
]


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_the_shared_cases(data):
    """As they draw and judge them for every implementation, infinite and huge values too."""
    call = data.draw(strategies.drawn(LINEAR_KL.call))
    if LINEAR_KL.kernel_dtype(call.arguments) not in DTYPES:
        return
    call = on_device(call)
    with configs.override(*LARGE), m4ov_kernels.backend("triton"):
        got = LINEAR_KL.evaluate(call)
    LINEAR_KL.judge(call, got)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_forward(kind):
    """Only its results, which are float32: the interpreter's bfloat16 stores truncate."""
    *heads, bias, ref_bias = inputs(20, 64, 40, 150, torch.bfloat16, bias=True)
    with m4ov_kernels.backend("triton"):
        found = linear_kl(*heads, bias=bias, ref_bias=ref_bias, kind=kind, temperature=0.7)
    with m4ov_kernels.backend("reference"):
        plain, exact = (
            linear_kl(
                *(x.to(dtype) for x in heads),
                bias=bias.to(dtype),
                ref_bias=ref_bias.to(dtype),
                kind=kind,
                temperature=0.7,
            )
            for dtype in (torch.float32, torch.float64)
        )
    sizes = [logit_terms(*head).amax(-1) for head in ((*heads[:2], bias), (*heads[2:], ref_bias))]
    assert_accurate("divergence", found, plain, exact, (sizes[0] + sizes[1]) / 0.7)


@pytest.mark.parametrize("kind", KINDS)
def test_one_head_twice_is_exactly_nothing_and_words_are_ruled_out(kind):
    hidden, weight, *_, bias, _ = inputs(20, 40, 40, 150, torch.float32, bias=True)
    bias[5:140] = -math.inf  # whole tiles and splits
    tensors = leaves(torch.float32, hidden, weight, bias)
    with m4ov_kernels.backend("triton"):
        found = linear_kl(*tensors[:2], hidden, weight, bias=tensors[2], ref_bias=bias, kind=kind)
    assert found.abs().max() <= (1e-7 if kind == "jsd" else 0.0)
    for grad in gradients(found, tensors, [torch.ones_like(found)]):
        assert grad.abs().max() < 1e-5


def test_a_word_that_one_head_rules_out():
    *heads, bias, ref_bias = inputs(7, 8, 5, 90, torch.float32, bias=True)
    bias[30:80] = -math.inf
    for kind in KINDS:
        tensors = leaves(torch.float32, *heads[:2])
        with m4ov_kernels.backend("triton"):
            found = linear_kl(*tensors, *heads[2:], bias=bias, ref_bias=ref_bias, kind=kind)
        assert (found == math.inf).all() if kind == "forward" else found.isfinite().all()
        assert all(grad.isfinite().all() for grad in gradients(found, tensors, [torch.ones_like(found)]))


@pytest.mark.parametrize("num_valid", [None, 6, 9])
def test_what_is_in_rows_that_do_not_count_reaches_nothing(num_valid):
    *heads, bias, ref_bias = inputs(9, 16, 8, 70, torch.float16, bias=True)
    mask = torch.tensor([True, False, True, False, True, True, False, True, True], device=DEVICE)
    results = []
    for rest in (math.nan, 1.0):
        hidden, other = (x.masked_fill(~mask[:, None], rest) for x in heads[::2])
        tensors = leaves(torch.float16, hidden, heads[1], bias)
        with m4ov_kernels.backend("triton"):
            found = linear_kl(
                *tensors[:2], other, heads[3], bias=tensors[2], ref_bias=ref_bias, mask=mask, num_valid=num_valid
            )
        results.append([found, *gradients(found, tensors, [torch.ones_like(found)])])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
        assert first.isfinite().all()
    assert not results[0][0][~mask].any()


def test_rows_beyond_num_valid_are_nan():
    heads = inputs(5, 8, 8, 40, torch.float32)[:4]
    mask = torch.tensor([True, False, True, True, True], device=DEVICE)
    hidden = heads[0].requires_grad_()
    with m4ov_kernels.backend("triton"):
        found = linear_kl(*heads, mask=mask, num_valid=2)
    assert found.isnan().tolist() == [False, False, False, True, True]
    assert torch.autograd.grad(found.sum(), hidden)[0].isnan().any(-1).tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("kind", ["reverse", "jsd"])
def test_a_rows_results_do_not_depend_on_other_rows_or_on_the_machine(kind):
    heads = inputs(40, 40, 24, 100, torch.float16)[:4]
    chosen = torch.randperm(40)[:11].to(DEVICE)
    results = []
    for processors, rows in ((2, slice(None)), (5, slice(None)), (1, chosen)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launches, "_processors", lambda device, count=processors: count)
            with m4ov_kernels.backend("triton"):
                results.append(linear_kl(heads[0][rows], heads[1], heads[2][rows], heads[3], kind=kind))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0][chosen], results[2])


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_what_is_needed(needs):
    tensors = inputs(9, 16, 8, 70, torch.float32, bias=True)
    options = ("reverse", 1.0, None, False)
    _, normalizer = head.linear_kl_fwd(*tensors, None, *options)
    given_tensors = (torch.randn(9, device=DEVICE), *tensors, None, normalizer, *options)
    whole = head.linear_kl_bwd(*given_tensors, True, True, True)
    some = head.linear_kl_bwd(*given_tensors, *needs)
    for need, one, other in zip(needs, whole, some, strict=True):
        assert torch.equal(other, one) if need else other.shape == (0,)

"""``linear_logprob`` in Triton against float64; see ``test_triton.py``."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import m4ov_kernels
from m4ov_kernels.head import linear_logprob, reference
from m4ov_kernels.head import triton as head
from m4ov_kernels.head import triton_logprob as kernels
from m4ov_kernels.head.logprob import raw

from . import strategies
from .numerics import EPS, assert_accurate, gradients, leaves
from .triton_blocks import DEVICE, dtypes, small_blocks, tensor

__all__ = ["small_blocks"]  # a fixture of every test here
FOUND = ("logprob", "logsumexp", "entropy", "total")
IGNORE = -100


def inputs(rows, width, vocab, dtype, layout="contiguous", ignored=0.3, bias=False, magnitude=1.0):
    hidden = tensor((rows, width), dtype, layout, magnitude)
    weight = tensor((vocab, width), dtype, layout, width**-0.5)
    targets = torch.randint(vocab, (rows,), device=DEVICE)
    targets[torch.rand(rows, device=DEVICE) < ignored] = IGNORE
    return hidden, weight, targets, tensor((vocab,), dtype) if bias else None


def like(tensors):
    return tuple(torch.full_like(t, torch.nan if t.is_floating_point() else -7) for t in tensors)


def by_kernels(
    hidden, weight, targets, bias, class_weight, grads, *, temperature=1.0, softcap=0.0, known=False, rounded=False
):
    """``FOUND``, the normalizer and the gradients, into memory full of NaN."""
    num_valid = int((targets != IGNORE).sum()) if known else None
    given_tensors = (hidden, weight, targets, bias, class_weight)
    common = (temperature, softcap, IGNORE, num_valid, rounded)
    more = (True, True, 0, 0, weight.shape[0], 0)
    made = head.linear_logprob_fwd(*given_tensors, *common, *more)
    found = head.linear_logprob_fwd(*given_tensors, *common, *more, out=like(made))
    assert all(torch.equal(a, b) for a, b in zip(made, found, strict=True))
    saved = (found[6], found[2], found[7])
    wanted = (0, weight.shape[0], True, True, bias is not None)
    out = like((hidden, weight, bias if bias is not None else hidden.new_empty(0)))
    out = tuple(torch.full(t.shape, torch.nan, dtype=t.dtype, device=DEVICE) for t in out)
    return [*found[:4], *head.linear_logprob_bwd(*given_tensors, *saved, *grads, *common, *wanted, out=out)]


def by_definition(dtype, hidden, weight, targets, bias, class_weight, grads, temperature, softcap, rounded):
    tensors = leaves(dtype, *(t for t in (hidden, weight, bias) if t is not None))
    of_bias = tensors[2] if bias is not None else None
    found = reference.linear_logprob(
        *tensors[:2], targets, of_bias, class_weight, temperature, softcap, IGNORE, rounded, 0
    )[:4]
    return [*found, *gradients(found, tensors, [grad.to(found[0].dtype) for grad in grads])]


def gradient_terms(hidden, weight, targets, bias, class_weight, grads, temperature, softcap):
    """What cancels in the gradients, in float64: the shares of the softmax and of the target, times the other factor;
    they are rounded to the dtype before the products are taken."""
    hidden, weight = hidden.double(), weight.double()
    logits = hidden @ weight.t() + (0.0 if bias is None else bias.double())
    logits = logits / temperature
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = logits.log_softmax(-1).clamp_min(-1e6)
    kept = (targets != IGNORE)[:, None]
    of = [grad.double().abs()[:, None] for grad in grads]
    p = log_p.exp()
    shares = p * (of[0] + of[1] + of[2] * (log_p.abs() + (p * log_p).sum(-1, keepdim=True).abs()))
    shares = shares.scatter_add(1, targets.clamp(min=0)[:, None], of[0])
    shares = (shares + of[3] * (1.0 if class_weight is None else class_weight.double())) * kept / temperature
    return {
        "grad_hidden_states": shares @ weight.abs(),
        "grad_weight": shares.t() @ hidden.abs(),
        "grad_bias": shares.sum(0),
    }


@given(
    rows=st.integers(0, 40),
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
@settings(max_examples=40, deadline=None)
def test_against_float64(rows, width, vocab, dtype, layout, bias, weighted, ignored, temperature, softcap, known):
    hidden, weight, targets, bias = inputs(rows, width, vocab, dtype, layout, ignored, bias)
    class_weight = torch.rand(vocab, device=DEVICE) if weighted else None
    grads = [torch.randn(rows, device=DEVICE) for _ in FOUND]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_CHUNK_WORDS", 64)
        patch.setattr(kernels, "GPU_CHUNK_BYTES", 0)
        options = {"temperature": temperature, "softcap": softcap}
        got = by_kernels(hidden, weight, targets, bias, class_weight, grads, known=known, **options)
    m4ov_kernels.check()
    arguments = (hidden, weight, targets, bias, class_weight, grads, temperature, softcap)
    plain, exact = (by_definition(d, *arguments, False) for d in (dtype, torch.float64))
    terms = gradient_terms(*arguments)
    names = (*FOUND, "grad_hidden_states", "grad_weight", "grad_bias")
    for name, ours, theirs, truth in zip(names, got, plain, exact, strict=False):
        assert_accurate(name, ours, theirs, truth, terms.get(name))

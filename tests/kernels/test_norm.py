"""rms_norm: native kernels on every ISA against float64; the contract's other points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import m4ov_kernels
from m4ov_kernels import rms_norm
from m4ov_kernels.norm import native, reference

from . import strategies
from .numerics import assert_accurate, gradients, leaves, poisoned, rms_norm_terms

EPS = 1e-6


def inputs(shape, dtype, layout="contiguous", magnitude=1.0, residual=False):
    x = strategies.tensor(shape, dtype, layout, magnitude)
    weight = strategies.tensor(shape[-1:], dtype)
    return x, weight, strategies.tensor(shape, dtype, layout, magnitude) if residual else None


def run(function, dtype, numerics, x, weight, residual, grads):
    """Outputs and gradients of ``function`` on copies in ``dtype``."""
    tensors = leaves(dtype, *(t for t in (x, weight, residual) if t is not None))
    out = function(*tensors, *([None] if residual is None else []), numerics=numerics)
    out = (out,) if isinstance(out, torch.Tensor) else out
    return *out, *gradients(out, tensors, [g.to(dtype) for g in grads[: len(out)]])


def ours(x, weight, residual, numerics):
    return rms_norm(x, weight, eps=EPS, residual=residual, numerics=numerics)


def plain(x, weight, residual, numerics):
    out = reference.rms_norm(x, weight, EPS, residual, numerics)
    return out if residual is not None else out[0]


@given(
    shape=strategies.shapes(),
    dtype=strategies.dtypes,
    layout=strategies.layouts,
    magnitude=strategies.magnitudes,
    numerics=strategies.numerics,
    residual=st.booleans(),
)
@settings(max_examples=60)
def test_native_forward_and_gradients(isa, shape, dtype, layout, magnitude, numerics, residual):
    x, weight, res = inputs(shape, dtype, layout, magnitude, residual)
    grads = strategies.tensor(shape, dtype, layout), strategies.tensor(shape, dtype)
    with m4ov_kernels.backend("native"):
        got = run(ours, dtype, numerics, x, weight, res, grads)
    baseline = run(plain, dtype, numerics, x, weight, res, grads)
    exact = run(plain, torch.float64, numerics, x, weight, res, grads)
    names = (["y", "sum"] if residual else ["y"]) + ["grad_x", "grad_weight", "grad_residual"][: 2 + residual]
    x64 = x.double() if res is None else x.double() + res.double()
    rstd = torch.rsqrt(x64.square().mean(-1, keepdim=True) + EPS)
    to_x = rms_norm_terms(grads[0], x64, weight, rstd)
    to_weight = (grads[0].double() * x64 * rstd).abs().reshape(-1, shape[-1]).sum(0)
    terms = {"grad_x": to_x, "grad_residual": to_x, "grad_weight": to_weight}
    for name, *tensors in zip(names, got, baseline, exact, strict=True):
        assert_accurate(name, *tensors, terms.get(name))


@pytest.mark.parametrize("dtype", strategies.HALF_AND_SINGLE)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 37), (3, 2049)])
def test_every_element_of_preallocated_outputs_is_written(isa, shape, dtype):
    x, weight, residual = inputs(shape, dtype, residual=True)
    out = (*poisoned(x, x), torch.full((shape[0],), torch.nan))
    got = native.rms_norm_fwd(x, weight, residual, EPS, "hf", out=out)
    assert all(a is b for a, b in zip(got, out, strict=True))
    assert not any(tensor.isnan().any() for tensor in out)
    grads = poisoned(x, weight)
    native.rms_norm_bwd(x, residual, out[1], weight, out[2], "hf", True, out=grads)
    assert not any(tensor.isnan().any() for tensor in grads)


@pytest.mark.parametrize("dtype", strategies.HALF_AND_SINGLE)
def test_bits_depend_neither_on_other_rows_nor_on_threads(isa, dtype):
    x, weight, residual = inputs((67, 515), dtype, residual=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(run(ours, dtype, "hf", x, weight, residual, (x, residual)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, a, b in zip(("y", "sum", "grad_x", "grad_weight", "grad_residual"), results[0], other, strict=True):
            assert torch.equal(a, b), name
    alone = ours(x[13:14], weight, residual[13:14], "hf")
    assert torch.equal(alone[0], results[0][0][13:14])


@pytest.mark.parametrize("numerics", ["hf", "vllm", "fp32"])
def test_rounding_contract(isa, numerics):
    """bfloat16 outputs have the reference's bits, but for a few where the reciprocal root differs in its last bit."""
    x, weight, residual = inputs((64, 1024), torch.bfloat16, residual=True)
    got, total = ours(x, weight, residual, numerics)
    expected, expected_total = plain(x, weight, residual, numerics)
    assert torch.equal(total, expected_total)
    assert (got == expected).float().mean() > 0.998
    others = [plain(x, weight, residual, other)[0] for other in ("hf", "vllm", "fp32") if other != numerics]
    assert all((other == expected).float().mean() < 0.99 for other in others), "the contracts are not told apart"


def test_extreme_values(isa):
    for dtype in strategies.HALF_AND_SINGLE:
        big = torch.finfo(dtype).max
        x = torch.tensor([[big, -big, 1.0, 0.0], [0.0] * 4, [torch.nan, 1, 2, 3], [torch.inf, 1, 2, 3]], dtype=dtype)
        weight = torch.ones(4, dtype=dtype)
        got, expected = ours(x, weight, None, "hf"), plain(x, weight, None, "hf")
        assert torch.equal(got.isnan(), expected.isnan()), (dtype, got, expected)
        torch.testing.assert_close(got, expected, equal_nan=True)


def test_gradcheck_of_the_reference():
    x, weight, residual = (t.double().requires_grad_() for t in inputs((3, 5), torch.float32, residual=True))
    with m4ov_kernels.backend("reference"):
        assert torch.autograd.gradcheck(lambda *t: ours(*t, "hf"), (x, weight, residual))
        assert torch.autograd.gradgradcheck(lambda *t: ours(*t, "hf"), (x, weight, residual))


def test_one_output_unused_and_frozen_weight():
    x, weight, residual = inputs((4, 33), torch.float32, residual=True)
    for wanted in (0, 1):
        grads = []
        for function in (ours, plain):
            tensors = leaves(torch.float32, x, residual)
            out = function(tensors[0], weight, tensors[1], "hf")[wanted]
            grads.append(gradients(out, tensors, [x]))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_mixed_dtypes_promote_as_pytorch_does():
    x, weight = torch.randn(4, 8).bfloat16(), torch.randn(8)
    assert rms_norm(x, weight, eps=EPS).dtype == torch.float32
    with pytest.raises(RuntimeError, match="different dtypes"), m4ov_kernels.backend("native"):
        rms_norm(x, weight, eps=EPS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_states": [1.0]}, TypeError, "hidden_states must be a tensor; got list"),
        ({"hidden_states": torch.ones(4, 8).int()}, TypeError, "hidden_states must be a bfloat16.*int32 tensor"),
        ({"hidden_states": torch.ones(4, 8).to_sparse()}, TypeError, "hidden_states must be a dense"),
        ({"hidden_states": torch.tensor(1.0)}, ValueError, r"weight must be \[D\]"),
        ({"hidden_states": torch.ones(4, 0), "weight": torch.ones(0)}, ValueError, "weight must be .* at least 1"),
        ({"weight": torch.ones(7)}, ValueError, r"weight must be \[8\].*got \[7\]"),
        ({"weight": torch.ones(8, device="meta")}, ValueError, "weight must be on cpu"),
        ({"residual": torch.ones(4, 8).half()}, TypeError, "residual must be torch.float32"),
        ({"residual": torch.ones(8, 4)}, ValueError, r"residual must be \[4, 8\]"),
        ({"numerics": "HF"}, ValueError, "numerics must be one of 'hf', 'vllm', 'fp32'; got 'HF'"),
        ({"eps": -1.0}, ValueError, "eps must be a number, 0 or greater"),
        ({"eps": float("nan")}, ValueError, "eps must be"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"hidden_states": torch.ones(4, 8), "weight": torch.ones(8), "eps": EPS} | change
    with pytest.raises(error, match="rms_norm: " + message):
        rms_norm(**arguments)

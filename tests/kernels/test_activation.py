"""swiglu: native kernels on every ISA against float64; the contract's other points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

import m4ov_kernels
from m4ov_kernels import swiglu
from m4ov_kernels.activation import native, reference

from . import strategies
from .numerics import assert_accurate, gradients, leaves, poisoned


def run(function, dtype, numerics, gate, up, grad):
    tensors = leaves(dtype, gate, up)
    out = function(*tensors, numerics=numerics)
    return out, *gradients(out, tensors, [grad.to(dtype)])


@given(
    shape=strategies.shapes(),
    dtype=strategies.dtypes,
    layout=strategies.layouts,
    magnitude=strategies.magnitudes,
    numerics=strategies.numerics,
)
@settings(max_examples=60)
def test_native_forward_and_gradients(isa, shape, dtype, layout, magnitude, numerics):
    gate, up, grad = (strategies.tensor(shape, dtype, layout, scale) for scale in (magnitude, 1.0, 1.0))
    with m4ov_kernels.backend("native"):
        got = run(swiglu, dtype, numerics, gate, up, grad)
    baseline = run(reference.swiglu, dtype, numerics, gate, up, grad)
    exact = run(reference.swiglu, torch.float64, numerics, gate, up, grad)
    for name, *tensors in zip(("y", "grad_gate", "grad_up"), got, baseline, exact, strict=True):
        assert_accurate(name, *tensors)


@pytest.mark.parametrize("dtype", strategies.HALF_AND_SINGLE)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 37), (3, 2049)])
def test_every_element_of_preallocated_outputs_is_written(isa, shape, dtype):
    gate, up = (strategies.tensor(shape, dtype) for _ in range(2))
    (out,) = poisoned(gate)
    assert native.swiglu_fwd(gate, up, "hf", out=out) is out
    assert not out.isnan().any()
    grads = poisoned(gate, up)
    native.swiglu_bwd(gate, gate, up, "hf", out=grads)
    assert not any(tensor.isnan().any() for tensor in grads)


def test_halves_of_one_projection(isa):
    both = torch.randn(9, 2 * 70, dtype=torch.bfloat16)
    gate, up = both.chunk(2, dim=-1)
    assert torch.equal(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))


@pytest.mark.parametrize("numerics", ["hf", "fp32"])
def test_rounding_contract(isa, numerics):
    gate, up = (torch.randn(64, 1024, dtype=torch.bfloat16) for _ in range(2))
    got = swiglu(gate, up, numerics=numerics)
    assert (got == reference.swiglu(gate, up, numerics)).float().mean() > 0.99
    other = reference.swiglu(gate, up, {"hf": "fp32", "fp32": "hf"}[numerics])
    assert (got == other).float().mean() < 0.9, "the contracts are not told apart"


def test_extreme_values(isa):
    for dtype in strategies.HALF_AND_SINGLE:
        big = torch.finfo(dtype).max
        gate = torch.tensor([big, -big, 0.0, -0.0, torch.nan, torch.inf, -torch.inf, 88.8, -88.8, -104.0], dtype=dtype)
        for value in (1.0, 0.0, torch.nan, torch.inf):
            up = torch.full_like(gate, value)
            got, expected = swiglu(gate, up), reference.swiglu(gate, up, "hf")
            torch.testing.assert_close(got, expected, equal_nan=True)


def test_gradcheck_of_the_reference():
    tensors = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    with m4ov_kernels.backend("reference"):
        assert torch.autograd.gradcheck(swiglu, tensors)
        assert torch.autograd.gradgradcheck(swiglu, tensors)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate": torch.ones(4, 8).long()}, TypeError, "gate must be a bfloat16.*int64 tensor"),
        ({"up": None}, TypeError, "up must be a tensor; got NoneType"),
        ({"up": torch.ones(4, 8).half()}, TypeError, "up must be torch.float32, as gate; got torch.float16"),
        ({"up": torch.ones(8, 4)}, ValueError, r"up must be \[4, 8\] on cpu, as gate"),
        ({"up": torch.ones(4, 8, device="meta")}, ValueError, "up must be .* as gate; got float32 tensor .* on meta"),
        ({"numerics": "bf16"}, ValueError, "numerics must be one of"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match="swiglu: " + message):
        swiglu(**({"gate": torch.ones(4, 8), "up": torch.ones(4, 8)} | change))

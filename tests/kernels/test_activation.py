"""The activations: what is their own; what they share with all operators is in ``test_operators.py``."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import m4ov_kernels
from m4ov_kernels import geglu, gelu, gelu_tanh, swiglu
from m4ov_kernels.activation import reference

from . import strategies
from .numerics import assert_accurate
from .operators.activation import GEGLU, geglu_far_below_zero


def test_halves_of_one_projection(isa):
    both = torch.randn(9, 2 * 70, dtype=torch.bfloat16)
    gate, up = both.chunk(2, dim=-1)
    assert torch.equal(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))


GATED = {
    "swiglu": (swiglu, reference.swiglu),
    "geglu": (geglu, lambda gate, up, numerics: reference.geglu(gate, up, "tanh", numerics)),
    "geglu, erf": (
        lambda gate, up, **options: geglu(gate, up, approximate="none", **options),
        lambda gate, up, numerics: reference.geglu(gate, up, "none", numerics),
    ),
}
APPROXIMATIONS = ("tanh", "none")


@pytest.fixture(params=GATED)
def gated(request):
    """A gated activation and its definition."""
    return GATED[request.param]


@pytest.mark.parametrize("numerics", ["hf", "fp32"])
def test_rounding_contract(isa, gated, numerics):
    function, definition = gated
    gate, up = (torch.randn(64, 1024, dtype=torch.bfloat16) for _ in range(2))
    got = function(gate, up, numerics=numerics)
    assert (got == definition(gate, up, numerics)).float().mean() > 0.99
    other = definition(gate, up, {"hf": "fp32", "fp32": "hf"}[numerics])
    assert (got == other).float().mean() < 0.9, "the contracts are not told apart"


def test_extreme_values(isa, gated):
    function, definition = gated
    for dtype in strategies.HALF_AND_SINGLE:
        gate = ends(dtype)
        if definition is GATED["geglu, erf"][1]:  # PyTorch makes NaN of inf there, and inf of its neighbours
            gate = gate[[2, 3, 4, 6, 7, 8, 9]]
        for value in (1.0, 0.0, torch.nan, torch.inf):
            up = torch.full_like(gate, value)
            got, expected = function(gate, up), definition(gate, up, "hf")
            torch.testing.assert_close(got, expected, equal_nan=True)


def ends(dtype):
    big = torch.finfo(dtype).max
    return torch.tensor([big, -big, 0.0, -0.0, torch.nan, torch.inf, -torch.inf, 88.8, -88.8, -104.0], dtype=dtype)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_gelu_of_extreme_values(isa, approximate):
    for dtype in strategies.HALF_AND_SINGLE:
        x = ends(dtype)
        expected = torch.where(x > 0, x, -0.0 * x)  # PyTorch's erf makes NaN of inf in float32
        torch.testing.assert_close(gelu(x, approximate=approximate), expected, equal_nan=True, atol=1e-6, rtol=1e-2)
        leaf = x.clone().requires_grad_()
        gelu(leaf, approximate=approximate).backward(torch.ones_like(x))
        assert leaf.grad[[0, 1, 2, 3, 7, 8, 9]].tolist() == [1, 0, 0.5, 0.5, 1, 0, 0], dtype


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_gelu_keeps_its_relative_precision_below_zero(isa, approximate):
    """1 + tanh and 1 + erf cancel there; an exponential does not. Down to results of 1e-36."""
    x = torch.linspace(-12.0 if approximate == "none" else -9.5, 0.0, 4001)
    exact = reference.gelu(x.double(), None, approximate)
    error = (gelu(x, approximate=approximate).double() - exact).abs() / exact.abs().clamp(min=1e-36)
    assert error.max() < 2e-5, error.max()


@pytest.mark.parametrize("numerics", ["hf", "fp32"])
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_geglu_far_below_zero(isa, approximate, numerics):
    """A value of -1e-37, which times 16 is a number and times infinity is infinite. Plain PyTorch has 0 and NaN."""
    for dtype in strategies.HALF_AND_SINGLE:
        for up in (16.0, math.inf):
            call = geglu_far_below_zero(dtype, up, approximate, numerics)
            got = GEGLU.evaluate(call)
            GEGLU.judge(call, got)
            if dtype is torch.float32:
                exact = GEGLU.evaluate(call, torch.float64)
                assert (exact["activated"] < 0).all()
                torch.testing.assert_close(got["activated"].double(), exact["activated"], rtol=1e-5, atol=0)


def _gelu(x: float, approximate: str) -> tuple[float, float]:
    """The value and the slope, by Python's exponentials, which do not cancel."""
    if approximate == "none":
        share, density = math.erfc(-x / math.sqrt(2)) / 2, math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    else:
        rate = 2 * math.sqrt(2 / math.pi)
        odds = math.exp(min(700.0, -rate * (x + 0.044715 * x**3)))
        share = 1 / (1 + odds)
        density = share * odds / (1 + odds) * rate * (1 + 3 * 0.044715 * x * x)
    return x * share, share + x * density


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_the_definition_in_float64(approximate):
    points = [-1e4, -30.0, -20.0, -12.0, -10.0, -9.0, -8.4, -6.0, -2.0, -0.7, -1e-3, -0.0]
    points += [-point for point in points]
    x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    value = reference.plain_gelu(x, approximate)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    exact = torch.tensor([_gelu(point, approximate) for point in points], dtype=torch.float64)
    torch.testing.assert_close(torch.stack((value, slope), 1), exact, rtol=1e-12, atol=1e-290)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert curvature.isfinite().all()
    assert torch.equal(value.signbit(), x.signbit())


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_the_definition_is_pytorchs_wherever_that_is_exact(approximate):
    """In other dtypes to the bit; and what is not finite comes out of float64 as it does out of PyTorch's."""
    for dtype in strategies.HALF_AND_SINGLE:
        x = torch.linspace(-12, 12, 2001).to(dtype)
        assert torch.equal(reference.plain_gelu(x, approximate), F.gelu(x, approximate=approximate))
    found = []
    for function in (reference.plain_gelu, lambda x, name: F.gelu(x, approximate=name)):
        ends = [math.inf, -math.inf, math.nan, 1e100, -1e100, 30.0, 1e4, -1e4, 0.5, -0.5]
        x = torch.tensor(ends, dtype=torch.float64, requires_grad=True)
        value = function(x, approximate)
        found.append((value, *torch.autograd.grad(value.sum(), x)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15, equal_nan=True)


def test_an_infinity_that_only_float64_has_is_judged():
    """Where plain PyTorch has NaN of 0 · inf, ours may have that or the infinity, and nothing else."""
    exact, plain = torch.tensor([-math.inf, 1.0]).double(), torch.tensor([math.nan, 1.0])
    for right in (-math.inf, math.nan):
        assert_accurate("activated", torch.tensor([right, 1.0]), plain, exact)
    for wrong in (math.inf, 0.0, -3e38):
        with pytest.raises(AssertionError, match="1 neither that infinity nor NaN"):
            assert_accurate("activated", torch.tensor([wrong, 1.0]), plain, exact)


def test_gelu_adds_its_bias_in_float32_and_rounds_once(isa):
    x, bias = torch.randn(64, 1024, dtype=torch.bfloat16), torch.randn(1024, dtype=torch.bfloat16)
    got = gelu_tanh(x, bias=bias)
    once = F.gelu(x.float() + bias.float(), approximate="tanh").bfloat16()
    assert (got == once).float().mean() > 0.99
    assert (got == F.gelu(x + bias, approximate="tanh")).float().mean() < 0.9
    assert torch.equal(got, gelu(x, bias=bias, approximate="tanh"))


def test_the_gradient_of_a_bias_does_not_depend_on_threads(isa):
    x, bias, grad = torch.randn(531, 515), torch.randn(515), torch.randn(531, 515)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
            found.append(torch.autograd.grad(gelu_tanh(leaves[0], bias=leaves[1]), leaves, grad))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_bias_of_another_dtype_and_a_frozen_input():
    x, bias = torch.randn(5, 8).bfloat16(), torch.randn(8, requires_grad=True)
    result = gelu_tanh(x, bias=bias)
    assert result.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(result.float().sum(), bias)
    assert grad.dtype == torch.float32
    same = bias.detach().bfloat16().requires_grad_()
    (ours,) = torch.autograd.grad(gelu_tanh(x, bias=same).float().sum(), same)
    torch.testing.assert_close(ours.float(), grad, atol=0.05, rtol=0.02)


def test_gelu_of_a_scalar_and_its_own_name_in_errors():
    torch.testing.assert_close(gelu(torch.tensor(0.7)), F.gelu(torch.tensor(0.7)))
    with pytest.raises(ValueError, match=r"gelu_tanh: bias must be \[3\]"):
        gelu_tanh(torch.ones(2, 3), bias=torch.ones(4))


def test_gradcheck_of_the_reference():
    x, other = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    calls = [(swiglu, (x, other))]
    for name in APPROXIMATIONS:
        calls += [
            (lambda x, u, name=name: geglu(x, u, approximate=name), (x, other)),
            (lambda x, b, name=name: gelu(x, bias=b, approximate=name), (x, bias)),
        ]
    with m4ov_kernels.backend("reference"):
        for function, tensors in calls:
            assert torch.autograd.gradcheck(function, tensors)
            assert torch.autograd.gradgradcheck(function, tensors)

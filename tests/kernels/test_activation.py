"""The activations: what is their own; what they share with all operators is in ``test_operators.py``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import m4ov_kernels
from m4ov_kernels import geglu, gelu, gelu_tanh, swiglu
from m4ov_kernels.activation import reference

from . import strategies


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
    if approximate == "none":  # float64's own erf cancels too
        exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    else:
        exact = x.double() * (2 * (2 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3)).sigmoid()
    error = (gelu(x, approximate=approximate).double() - exact).abs() / exact.abs().clamp(min=1e-36)
    assert error.max() < 2e-5, error.max()


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

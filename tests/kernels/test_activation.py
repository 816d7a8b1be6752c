"""swiglu: what is its own; what it shares with all operators is in ``test_operators.py``."""

from __future__ import annotations

import pytest
import torch

import m4ov_kernels
from m4ov_kernels import swiglu
from m4ov_kernels.activation import reference

from . import strategies


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

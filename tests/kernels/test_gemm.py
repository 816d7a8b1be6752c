"""invariant_linear: right by the numerics rule, whole, and the same bits for a row in any batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from m4ov_kernels import invariant_linear
from m4ov_kernels.gemm import native

from . import draws, strategies
from .draws import Draw
from .guarded import Output
from .numerics import assert_accurate, gradients, leaves
from .test_invariance import assert_same_bits, on_threads

NAMES = ("output", "grad_input", "grad_weight", "grad_bias")


def _problem(draw: Draw, dtype: torch.dtype):
    rows = draw.choice((0, 1, 2, 5, 16, 17, 63, 64, 65, 130, 200))
    width, columns = (draw.choice((1, 2, 7, 16, 33, 64, 65, 96, 97, 130, 513, 1100)) for _ in range(2))
    shape = (rows, width) if draw.boolean() or rows % 2 else (2, rows // 2, width)
    input = draws.tensor(draw, shape, dtype)
    weight = draws.tensor(draw, (columns, width), dtype, scale=width**-0.5)
    bias = draws.tensor(draw, (columns,), dtype) if draw.boolean() else None
    return input, weight, bias, draws.tensor(draw, (*shape[:-1], columns), dtype)


def _run(function, dtype, input, weight, bias, grad):
    tensors = leaves(dtype, *(x for x in (input, weight, bias) if x is not None))
    output = function(*tensors)
    return [output, *gradients([output], tensors, [grad.to(output.dtype)])]


def _terms(input, weight, bias, grad):
    """The sums that results are, over absolute values."""
    x, w, g = (t.double().abs() for t in (input, weight, grad))
    flat_x, flat_g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    output = F.linear(x, w) if bias is None else F.linear(x, w, bias.double().abs())
    return [output, g @ w, flat_g.t() @ flat_x, flat_g.sum(0)]


@given(data=st.data(), dtype=strategies.dtypes)
@settings(max_examples=12)
def test_against_float64(isa, data, dtype):
    problem = data.draw(strategies.drawn(lambda draw: _problem(draw, dtype)))
    ours, plain = (_run(function, dtype, *problem) for function in (invariant_linear, F.linear))
    exact = _run(F.linear, torch.float64, *problem)
    for name, got, theirs, truth, terms in zip(NAMES, ours, plain, exact, _terms(*problem), strict=False):
        assert_accurate(name, got, theirs, truth, terms)


@given(data=st.data(), dtype=strategies.dtypes)
@settings(max_examples=12)
def test_a_row_keeps_its_bits(isa, data, dtype):
    def hold(draw: Draw) -> None:
        input, weight, bias, grad = _problem(draw, dtype)
        with on_threads(draw.integer(1, 3)):
            whole = _run(invariant_linear, dtype, input, weight, bias, grad)
        flat = [x.reshape(-1, x.shape[-1]) for x in (input, grad, *whole[:2])]
        rows = flat[0].shape[0]
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(draw.integer(0, 2**32 - 1)))
        for count in {rows, min(rows, 1), draw.integer(0, rows)}:
            some = order[:count]
            layouts = ("contiguous", "wide rows", "offset", "transposed", "every other")
            part, towards = (draws.laid_out(x[some], draw.choice(layouts)) for x in flat[:2])
            moved = draws.laid_out(weight, draw.choice(layouts))
            with on_threads(draw.integer(1, 3)):
                found = _run(invariant_linear, dtype, part, moved, bias, towards)
            assert_same_bits(f"output of {count}", found[0], flat[2][some])
            assert_same_bits(f"grad_input of {count}", found[1], flat[3][some])

    data.draw(strategies.drawn(hold))


@given(data=st.data(), dtype=strategies.dtypes, shift=st.integers(0, 3), transposed=st.booleans())
@settings(max_examples=8)
def test_every_element_is_written_and_nothing_else(isa, data, dtype, shift, transposed):
    input, weight, bias, grad = data.draw(strategies.drawn(lambda draw: _problem(draw, dtype)))
    given = (grad, weight, None) if transposed else (input, weight, bias)
    flat = given[0].reshape(-1, given[0].shape[-1])
    expected = native.invariant_linear_fwd(flat, *given[1:], transposed=transposed)
    guarded = Output(expected, shift)
    native.invariant_linear_fwd(flat, *given[1:], transposed=transposed, out=guarded.values)
    guarded.check("output")
    assert_same_bits("output", guarded.values, expected)


@pytest.mark.parametrize("dtype", draws.DTYPES)
def test_infinities_stay_in_their_row(isa, dtype):
    input, weight = torch.randn(70, 40).to(dtype), torch.randn(30, 40).to(dtype)
    clean = invariant_linear(input, weight)
    input[3, 5], input[66, 0] = torch.inf, torch.nan
    found = invariant_linear(input, weight)
    for row in range(70):
        assert torch.equal(found[row], clean[row]) is (row not in (3, 66)), row
    assert found[66].isnan().all()


def test_frozen_parameters_cost_nothing():
    input, weight = torch.randn(5, 8), torch.randn(3, 8)
    for needed in (input, weight):
        leaf = needed.clone().requires_grad_()
        given = (leaf, weight) if needed is input else (input, leaf)
        invariant_linear(*given).sum().backward()
        assert leaf.grad is not None
    leaf = input.clone().requires_grad_()
    (grad,) = torch.autograd.grad(invariant_linear(leaf, weight).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": [1.0]}, TypeError, r"input must be a tensor; got list \[1.0\]"),
        ({"input": torch.ones(2, 8).long()}, TypeError, "input must be a bfloat16.*int64 tensor"),
        ({"input": torch.ones(2, 0)}, ValueError, r"input must be \[..., K\] with K at least 1; got \[2, 0\]"),
        ({"weight": torch.ones(3, 9)}, ValueError, r"weight must be \[N, 8\] with N at least 1; got \[3, 9\]"),
        ({"weight": torch.ones(0, 8)}, ValueError, r"weight must be \[N, 8\]"),
        ({"weight": torch.ones(3, 8).half()}, TypeError, "weight must be torch.float32, as input; got torch.float16"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be \[3\]; got \[4\]"),
        ({"bias": torch.ones(3, device="meta")}, ValueError, "bias must be on cpu, as input; got one on meta"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    good = {"input": torch.ones(2, 8), "weight": torch.ones(3, 8), "bias": None}
    with pytest.raises(error, match="invariant_linear: " + message):
        invariant_linear(**(good | change))


def test_what_cannot_be_kept_is_refused():
    x = torch.ones(2, 8, dtype=torch.float64)
    with pytest.raises(
        RuntimeError, match=r"is for bfloat16, float16 and float32 on the CPU; got torch\.float64 on cpu"
    ):
        invariant_linear(x, x)
    x = torch.ones(2, 8, device="meta")
    with pytest.raises(RuntimeError, match=r"got torch\.float32 on meta"):
        invariant_linear(x, x)
    x = torch.ones(2, 8)
    with pytest.raises(RuntimeError, match=r"is for plain tensors"):
        invariant_linear(x.as_subclass(type("Other", (torch.Tensor,), {})), x)
    with pytest.raises(RuntimeError, match=r"not for torch\.func transforms"):
        torch.func.vmap(invariant_linear, (0, None))(x[None], x)

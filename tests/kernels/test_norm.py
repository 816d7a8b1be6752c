"""The norms: what is their own; what they share with all operators is in ``test_operators.py``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import m4ov_kernels
from m4ov_kernels import layer_norm, rms_norm
from m4ov_kernels.norm import reference

from . import strategies
from .numerics import assert_accurate, gradients, leaves

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


@pytest.mark.parametrize("columns", [4304, 8192])
def test_equal_values_in_a_wide_row(isa, columns):
    """A sum of equal values rounds in one direction at every step."""
    x, weight, grad = torch.full((2, columns), 0.1), torch.ones(columns), torch.full((2, columns), 0.3)
    x[1], grad[1] = 0.7, -0.9
    got, baseline, exact = (
        run(function, dtype, "vllm", x, weight, None, (grad,))
        for function, dtype in ((ours, torch.float32), (plain, torch.float32), (plain, torch.float64))
    )
    assert_accurate("y", got[0], baseline[0], exact[0])


def test_only_the_sum_is_used():
    """No gradient comes from the norm then, though its factor is infinite: 0 · inf would be NaN."""
    x, weight, residual = torch.zeros(3, 8), torch.ones(8), torch.zeros(3, 8)
    tensors = leaves(torch.float32, x, weight, residual)
    _, total = rms_norm(*tensors[:2], eps=0.0, residual=tensors[2])
    grad_x, grad_weight, grad_residual = gradients(total, tensors, [torch.ones(3, 8)])
    assert torch.equal(grad_x, torch.ones(3, 8))
    assert torch.equal(grad_residual, torch.ones(3, 8))
    assert not grad_weight.any()


# ---- layer_norm


def layer_norm_inputs(shape, dtype):
    return [strategies.tensor(size, dtype) for size in (shape, shape[-1:], shape[-1:], shape)]


def our_layer_norm(x, weight, bias, residual=None, numerics="hf"):
    return layer_norm(x, weight, bias, eps=EPS, residual=residual, numerics=numerics)


@pytest.mark.parametrize("dtype", strategies.HALF_AND_SINGLE)
def test_layer_norm_bits_depend_neither_on_other_rows_nor_on_threads(isa, dtype):
    tensors = layer_norm_inputs((67, 515), dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            copies = leaves(dtype, *tensors)
            out = our_layer_norm(*copies)
            results.append((*out, *gradients(out, copies, tensors[:1] + tensors[3:])))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    x, weight, bias, residual = tensors
    alone = our_layer_norm(x[13:14], weight, bias, residual[13:14])
    assert torch.equal(alone[0], results[0][0][13:14])


@pytest.mark.parametrize("numerics", ["hf", "vllm", "fp32"])
def test_layer_norm_rounding_contract(isa, numerics):
    x, weight, bias, residual = layer_norm_inputs((64, 1152), torch.bfloat16)
    got, total = our_layer_norm(x, weight, bias, residual, numerics)
    assert torch.equal(total, x + residual)
    rounded = F.layer_norm(x + residual, (1152,), weight, bias, EPS)
    exact = F.layer_norm(x.float() + residual.float(), (1152,), weight.float(), bias.float(), EPS).bfloat16()
    expected, other = (exact, rounded) if numerics == "fp32" else (rounded, exact)
    assert (got == expected).float().mean() > 0.995
    assert (got == other).float().mean() < 0.95, "the contracts are not told apart"


@pytest.mark.parametrize("columns", [5, 1152, 4304])
@pytest.mark.parametrize("mean", [1e3, -1e6])
def test_layer_norm_of_a_large_mean(isa, columns, mean):
    """As if the mean were subtracted in float64: no error of the mean's own size, in the result or the gradient."""
    x = (torch.randn(7, columns) + mean).requires_grad_()
    grad = torch.randn(7, columns)
    exact = x.detach().double().requires_grad_()
    expected = F.layer_norm(exact, (columns,), eps=EPS)
    got = layer_norm(x, None, None, eps=EPS)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    (grad_x,) = torch.autograd.grad(got, x, grad)
    (grad_exact,) = torch.autograd.grad(expected, exact, grad.double())
    # The saved mean is rounded to float32, which moves every normalised value of a row alike, by so much:
    rstd = (exact.detach().var(-1, correction=0, keepdim=True) + EPS).rsqrt()
    moved = abs(mean) * 2.0**-24 * rstd
    normed = expected.detach()
    allowed = (
        1.1
        * moved
        * rstd
        * (
            (grad.double() * normed).mean(-1, keepdim=True).abs()
            + normed.abs() * grad.double().mean(-1, keepdim=True).abs()
        )
        + moved * moved * rstd * grad.abs().amax()
        + 1e-5 * rstd * grad.abs().amax()
    )
    assert ((grad_x.double() - grad_exact).abs() <= allowed).all()


@pytest.mark.parametrize("columns", [1, 7, 32, 1152, 4304])
def test_layer_norm_of_constant_rows(isa, columns):
    """Their variance is 0 exactly, whatever the constant, so that the result is the bias."""
    for dtype in strategies.HALF_AND_SINGLE:
        x = torch.tensor([0.1, -3.3, 1e4, 6e-5])[:, None].to(dtype).expand(4, columns).clone().requires_grad_()
        bias = torch.randn(columns).to(dtype)
        got = layer_norm(x, torch.ones_like(bias), bias, eps=EPS)
        assert torch.equal(got, bias.expand(4, columns)), dtype
        (grad,) = torch.autograd.grad(got, x, torch.ones_like(got))
        assert grad.abs().max() <= 1e-2, (dtype, grad.abs().max())


def test_layer_norm_extreme_values(isa):
    for dtype in strategies.HALF_AND_SINGLE:
        big = torch.finfo(dtype).max
        x = torch.tensor([[big, -big, 1.0, 0.0], [0.0] * 4, [torch.nan, 1, 2, 3], [torch.inf, 1, 2, 3]], dtype=dtype)
        got = layer_norm(x, torch.ones(4, dtype=dtype), None, eps=EPS)
        assert got.isnan().tolist() == [[False] * 4, [False] * 4, [True] * 4, [True] * 4], (dtype, got)


def test_layer_norm_gradcheck_of_the_reference():
    tensors = [tensor.double().requires_grad_() for tensor in layer_norm_inputs((3, 5), torch.float32)]
    with m4ov_kernels.backend("reference"):
        for count in (1, 2, 3):  # frozen or absent: weight, bias
            call = lambda x, *rest: our_layer_norm(x, *[*rest, None, None][:2])  # noqa: E731
            assert torch.autograd.gradcheck(call, tensors[:count])
        assert torch.autograd.gradcheck(our_layer_norm, tensors)
        assert torch.autograd.gradgradcheck(our_layer_norm, tensors)


def test_layer_norm_without_weight_or_bias_and_with_either_frozen():
    x, weight, bias, residual = layer_norm_inputs((5, 33), torch.float32)
    torch.testing.assert_close(layer_norm(x, None, None, eps=EPS), F.layer_norm(x, (33,), eps=EPS))
    torch.testing.assert_close(layer_norm(x, weight, None, eps=EPS), F.layer_norm(x, (33,), weight, eps=EPS))
    torch.testing.assert_close(layer_norm(x, None, bias, eps=EPS), F.layer_norm(x, (33,), None, bias, EPS))
    for wanted in (0, 1, 2, 3):
        tensors = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, weight, bias, residual))]
        normed, total = our_layer_norm(*tensors)
        (ours,) = torch.autograd.grad(normed.sum() + total.square().sum(), tensors[wanted], allow_unused=True)
        plain = F.layer_norm(tensors[0] + tensors[3], (33,), tensors[1], tensors[2], EPS).sum()
        plain = plain + (tensors[0] + tensors[3]).square().sum()
        (expected,) = torch.autograd.grad(plain, tensors[wanted])
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


def test_layer_norm_of_mixed_dtypes_keeps_the_inputs():
    x, weight, bias = torch.randn(4, 8).bfloat16(), torch.randn(8), torch.randn(8)
    assert layer_norm(x, weight, bias, eps=EPS).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="different dtypes"), m4ov_kernels.backend("native"):
        layer_norm(x, weight, bias, eps=EPS)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_gradients_of_a_sum_that_float16_does_not_hold(name, backend):
    """The sum that is returned is infinite; what was normalised is not, nor what comes of it."""
    operator = m4ov_kernels.dispatch.OPERATORS[name]
    if (reason := operator.unavailable(backend, "cpu", torch.float16)) is not None:
        pytest.skip(reason)
    x, residual = (6e4 * (torch.rand(5, 48) - 0.2) for _ in range(2))
    weight, bias = torch.rand(48) + 0.5, torch.randn(48)
    parameters = [weight] if name == "rms_norm" else [weight, bias]
    grads = [1e3 * torch.randn(5, 48), torch.randn(5, 48)]
    given = [tensor.half() for tensor in (x, residual, *parameters, *grads)]

    def results(function, dtype):
        tensors = leaves(dtype, *given[:-2])
        out = function(*tensors)
        return [*out, *gradients(out, tensors, [grad.to(dtype) for grad in given[-2:]])]

    def ours(x, residual, *parameters):
        with m4ov_kernels.backend(backend):
            return getattr(m4ov_kernels, name)(x, *parameters, eps=EPS, residual=residual, numerics="fp32")

    def plain(x, residual, *parameters):
        if name == "rms_norm":
            return reference.rms_norm(x, *parameters, EPS, residual, "fp32")
        return reference.layer_norm(x, *parameters, residual, EPS, "fp32")

    found = [results(ours, torch.float16), results(plain, torch.float16), results(plain, torch.float64)]
    assert found[0][1].isinf().any()
    for place, one in enumerate(
        ("normed", "total", "grad_x", "grad_residual", "grad_weight", "grad_bias")[: len(found[0])]
    ):
        assert_accurate(one, *(values[place] for values in found))

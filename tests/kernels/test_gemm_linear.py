"""int4_linear, int8_linear, fp8_linear: what they define, their panels, their gradients and how they are called.

Accuracy on every ISA, faults, threads and fuzzing come from ``operators/gemm.py``; a row's bits from
``test_invariance.py``; compilation and registration from ``test_dispatch.py``.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import m4ov_kernels
from m4ov_kernels import fp8_linear, int4_linear, int8_linear
from m4ov_kernels.gemm import QUANTIZED_LINEAR, native, reference
from m4ov_kernels.gemm.linear import ACTIVATIONS, EPILOGUES
from m4ov_kernels.gemm.panels import KINDS, Panels
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight

from . import draws, strategies
from .draws import Draw
from .guarded import Output
from .numerics import assert_accurate
from .operators import CASES, Call
from .operators.activation import gelu_share
from .quantized import drawn_weight
from .test_invariance import assert_same_bits, on_threads

FUNCTIONS = {"int4": int4_linear, "int8": int8_linear, "fp8": fp8_linear}
CPU = torch.device("cpu")
NATIVE = QUANTIZED_LINEAR.unavailable("native", "cpu", torch.float32) is None
kinds = st.sampled_from(tuple(FUNCTIONS))


def weight_of(draw: Draw, kind: str, even: bool = False):
    N = draw.choice((1, 2, 7, 63, 64, 65, 128, 130, 200))
    return drawn_weight(kind, N + N % 2 if even else N, draw.choice((1, 2, 5, 31, 32, 33, 64, 127, 130, 300)), draw)


def called(weight, x, **options):
    kind = KINDS[type(weight)]
    if kind == "int8":
        options.pop("activation", None)
    return FUNCTIONS[kind](x, weight, **options)


# The definition


def _plainly(x: torch.Tensor, weight, activation: str) -> torch.Tensor:
    """What enters the product, one row at a time, in Python's words."""
    out = torch.empty(x.shape, dtype=torch.float64)
    static = getattr(weight, "input_scale", None)
    for index, row in enumerate(x):
        row = row.float()
        if getattr(weight, "pre_quant_scale", None) is not None:
            row = row * weight.pre_quant_scale.float()
        if activation == "bf16":
            out[index] = row.bfloat16().double()
            continue
        largest = 127 if activation == "int8" else 448
        block = 128 if activation == "fp8" and getattr(weight, "granularity", "") == "block" else len(row)
        for first in range(0, len(row), block):
            part = row[first : first + block]
            scale = part.abs().max() / largest
            scale = torch.maximum(scale, torch.tensor(2.0**-126))
            if activation == "fp8" and static is not None:
                codes = (part / static.float()).clamp(-448, 448).to(torch.float8_e4m3fn).double()
                out[index, first : first + block] = codes * static.double()
            elif not part.isfinite().all():
                out[index, first : first + block] = torch.nan
            else:
                ratio = part / scale
                codes = torch.round(ratio) if activation == "int8" else ratio.to(torch.float8_e4m3fn)
                out[index, first : first + block] = codes.double() * scale.double()
    return out


@given(data=st.data(), kind=kinds, dtype=strategies.dtypes)
@settings(max_examples=60)
def test_the_reference_is_what_is_written(data, kind, dtype):
    def hold(draw: Draw) -> None:
        weight, epilogue = weight_of(draw, kind, even=True), draw.choice((None, *EPILOGUES))
        activation = draw.choice([name for name in ACTIVATIONS[kind] if name != "auto"])
        N, K = weight.shape
        x = draws.tensor(draw, (draw.integer(0, 4), K), dtype, draws.kinds(draw)())
        bias = draws.tensor(draw, (N,), dtype)
        rows = reference.rounded(_scaled(x, weight), weight, activation, torch.float64)
        expected = _plainly(x, weight, activation)
        torch.testing.assert_close(rows, expected, rtol=0, atol=0, equal_nan=True)
        y = expected @ weight.dequantize(torch.float64).t() + bias.double()
        if epilogue == "swiglu":
            y = F.silu(y[:, : N // 2]) * y[:, N // 2 :]
        elif epilogue is not None:
            y = y * gelu_share(y, "tanh" if epilogue == "gelu_tanh" else "none")
        residual = draws.tensor(draw, tuple(y.shape), dtype)
        with m4ov_kernels.backend("reference"):
            options = {"activation": activation, "epilogue": epilogue}
            found = called(weight, x.double(), bias=bias.double(), residual=residual.double(), **options)
        torch.testing.assert_close(found, y + residual.double(), rtol=1e-12, atol=0, equal_nan=True)

    data.draw(strategies.drawn(hold))


def _scaled(x, weight):
    factor = getattr(weight, "pre_quant_scale", None)
    return x.float() if factor is None else x.float() * factor.float()


@given(data=st.data(), kind=kinds)
@settings(max_examples=20)
def test_gradients_pass_straight_through_the_rounding(data, kind):
    """In float64, of the smooth function of the rounded activations; by gradcheck for what is not rounded."""

    def hold(draw: Draw) -> None:
        weight = drawn_weight(kind, draw.choice((2, 6)), draw.choice((1, 5, 33)), draw)
        factor = getattr(weight, "pre_quant_scale", None)
        sizes = (weight.dequantize(torch.float64), torch.ones(1) if factor is None else factor.double())
        if max(float(size.abs().max()) for size in sizes) > 1e3:
            return
        N, K = weight.shape
        epilogue = draw.choice((None, *EPILOGUES))
        activation = draw.choice([name for name in ACTIVATIONS[kind] if name != "auto"])
        options = {"activation": activation, "epilogue": epilogue}
        x, bias = torch.randn(3, K, dtype=torch.float64), torch.randn(N, dtype=torch.float64, requires_grad=True)
        residual = torch.randn(3, N // 2 if epilogue == "swiglu" else N, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda b, r: called(weight, x, bias=b, residual=r, **options), (bias, residual))
        leaf = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(called(weight, leaf, bias=bias, **options).sum(), leaf)
        factor = getattr(weight, "pre_quant_scale", None)
        factor = torch.ones(K, dtype=torch.float64) if factor is None else factor.double()
        rows = reference.rounded(_scaled(x, weight), weight, activation, torch.float64).requires_grad_()
        y = rows @ weight.dequantize(torch.float64).t() + bias
        if epilogue == "swiglu":
            y = F.silu(y[:, : N // 2]) * y[:, N // 2 :]
        elif epilogue is not None:
            y = y * gelu_share(y, "tanh" if epilogue == "gelu_tanh" else "none")
        (expected,) = torch.autograd.grad(y.sum(), rows)
        torch.testing.assert_close(found, expected * factor, rtol=1e-11, atol=1e-14)

    data.draw(strategies.drawn(hold))


def test_rows_that_are_not_finite_stay_alone(isa):
    for kind in FUNCTIONS:
        for activation in ACTIVATIONS[kind]:
            weight = {"int4": Int4Weight, "int8": Int8Weight, "fp8": Fp8Weight}[kind].quantize(torch.randn(70, 40))
            x = torch.randn(9, 40)
            clean = called(weight, x, activation=activation)
            x[3, 5], x[7, 0] = torch.inf, torch.nan
            found = called(weight, x, activation=activation)
            assert torch.equal(found[[0, 1, 2, 4, 5, 6, 8]], clean[[0, 1, 2, 4, 5, 6, 8]])
            assert not found[3].isfinite().any() or activation in ("auto", "bf16")
            assert found[7].isnan().all()


# Calls


@given(data=st.data(), dtype=strategies.dtypes)
@settings(max_examples=6)
def test_of_the_sizes_of_models(isa, data, dtype):
    def hold(draw: Draw) -> None:
        kind = draw.choice(tuple(FUNCTIONS))
        N, K = draw.choice(((1152, 64), (66, 4304), (70, 3420), (257, 1152), (64, 4096)))
        weight = drawn_weight(kind, N, K, draw)
        rows = draw.choice((1, 3, 4, 5, 8, 33, 64, 129, 600))
        epilogue = draw.choice((None, "gelu", "swiglu")) if N % 2 == 0 else None
        arguments = {"x": draws.tensor(draw, (rows, K), dtype), "weight": weight, "epilogue": epilogue}
        arguments |= {"bias": draws.tensor(draw, (N,), dtype), "residual": None}
        if kind != "int8":
            arguments["activation"] = draw.choice(ACTIVATIONS[kind])
        case, call = CASES[f"{kind}_linear"], Call(arguments, {}, ())
        case.judge(call, case.evaluate(call))

    data.draw(strategies.drawn(hold))


def test_auto_chooses_by_the_number_of_rows(isa):
    weight = Int4Weight.quantize(torch.randn(70, 64), group_size=32)
    x = torch.randn(5, 64)
    assert_same_bits("4 rows", int4_linear(x[:4], weight), int4_linear(x[:4], weight, activation="bf16"))
    assert_same_bits("2 × 2 rows", int4_linear(x[:4].view(2, 2, 64), weight)[1], int4_linear(x[2:4], weight))
    assert_same_bits("5 rows", int4_linear(x, weight), int4_linear(x, weight, activation="int8"))
    fp8 = Fp8Weight.quantize(torch.randn(70, 64))
    assert_same_bits("fp8", fp8_linear(x, fp8), fp8_linear(x, fp8, activation="bf16"))


@pytest.mark.skipif(not NATIVE, reason="nothing but the reference serves it here")
def test_inside_invariant_auto_does_not_look_at_the_rows(isa):
    weight, x = Int4Weight.quantize(torch.randn(70, 64), group_size=32), torch.randn(9, 64)
    for epilogue in (None, *EPILOGUES):
        with m4ov_kernels.invariant():
            whole = int4_linear(x, weight, epilogue=epilogue)
            assert_same_bits("one row", int4_linear(x[3:4], weight, epilogue=epilogue), whole[3:4])
            leaf = x.clone().requires_grad_()
            assert_same_bits("with gradients", int4_linear(leaf, weight, epilogue=epilogue).detach(), whole)
    with m4ov_kernels.invariant():
        bf16 = int4_linear(x, weight, activation="bf16")
        assert_same_bits("bf16", int4_linear(x, weight), bf16)


def test_inside_invariant_nothing_but_kernels_serves():
    weight, x = Int4Weight.quantize(torch.randn(7, 64)), torch.randn(2, 64)
    with (
        m4ov_kernels.invariant(),
        m4ov_kernels.backend("reference"),
        pytest.raises(RuntimeError, match="int4_linear: invariance was asked for, but backend 'reference' is not"),
    ):
        int4_linear(x, weight)


@given(data=st.data(), kind=kinds, dtype=strategies.dtypes, shift=st.integers(0, 3), threads=st.integers(1, 3))
@settings(max_examples=15)
def test_the_raw_gradient(isa, data, kind, dtype, shift, threads):
    """Of panels, against float64: whole, the same bits on any threads and in any company."""

    def hold(draw: Draw) -> None:
        weight = weight_of(draw, kind)
        N, K = weight.shape
        if float(weight.dequantize(torch.float64).abs().max()) > 1e6:  # the ends are judged in test_operators.py
            return
        grad = draws.tensor(draw, (draw.choice((0, 1, 5, 17, 64, 130)), N), dtype)
        panels = weight.panels()
        given = (panels.codes, panels.scales, panels.zeros, panels.order, kind, K, panels.group)
        found = native.quantized_linear_bwd(grad, *given)
        output = Output(found, shift)
        with on_threads(threads):
            native.quantized_linear_bwd(grad, *given, out=output.values)
        output.check("grad_x")
        assert_same_bits("grad_x", output.values, found)
        for row in range(0, len(grad), 7):
            alone = draws.laid_out(grad[row : row + 1], draw.choice(("contiguous", "wide rows", "every other")))
            assert_same_bits("one row", native.quantized_linear_bwd(alone, *given), found[row : row + 1])
        matrix = weight.dequantize(torch.float64)
        exact = grad.double() @ matrix
        plain = (grad.float() @ matrix.float()).to(dtype)
        terms = (grad.double().square() @ matrix.square()).sqrt() * (1 + math.sqrt(N) / 4)
        assert_accurate("grad_x", found, plain, exact, terms)

    data.draw(strategies.drawn(hold))


def test_frozen_parts_cost_nothing():
    weight = Int8Weight.quantize(torch.randn(6, 8))
    x, bias = torch.randn(3, 8), torch.randn(6, requires_grad=True)
    int8_linear(x, weight, bias=bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((6,), 3.0))
    with torch.no_grad():
        assert not int8_linear(x.requires_grad_(), weight).requires_grad


def test_what_is_no_weight_of_the_kind_is_refused():
    int4, int8 = Int4Weight.quantize(torch.randn(6, 8)), Int8Weight.quantize(torch.randn(6, 8))
    x = torch.randn(2, 8)
    for wrong in (int8, int8.panels(), int4.panels(paired=True), torch.randn(6, 8)):
        with pytest.raises(
            TypeError, match=r"int4_linear: weight must be an Int4Weight, or panels of one, not paired but for 's"
        ):
            int4_linear(x, wrong)
    with pytest.raises(TypeError, match=r"got Int8Weight Int8Weight\(codes=int8 \[6, 8\], scales=float32 \[6, 1\]\)"):
        int4_linear(x, int8)


def test_compiled_with_weights_that_nothing_has_laid_out():
    compiled = torch.compile(int4_linear, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 40, requires_grad=True)
    weights = [Int4Weight.quantize(torch.randn(66, 40), group_size=32) for _ in range(3)]
    weights.append(Int4Weight.quantize(torch.randn(66, 40), group_size=32, g_idx=(torch.randperm(40) // 32).int()))
    for _ in range(2):
        for weight in weights:
            found = compiled(x, weight)
            torch.testing.assert_close(found, int4_linear(x, weight))
            (grad,) = torch.autograd.grad(found.sum(), x)
            torch.testing.assert_close(grad, torch.autograd.grad(int4_linear(x, weight).sum(), x)[0])


def test_compiled_for_any_number_of_rows():
    weight = Int4Weight.quantize(torch.randn(66, 40), group_size=32)
    compiled = torch.compile(int4_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 3, 4, 5, 6, 70, 1):
        x = torch.randn(rows, 40)
        torch.testing.assert_close(compiled(x, weight), int4_linear(x, weight))


def test_nothing_is_converted_under_autocast():
    weight, x = Int4Weight.quantize(torch.randn(66, 40), group_size=32), torch.randn(3, 40)
    for backend in ("reference", None):
        with m4ov_kernels.backend(backend):
            expected = int4_linear(x, weight, activation="int8")
            with torch.autocast("cpu", torch.bfloat16):
                found = int4_linear(x, weight, activation="int8")
        assert_same_bits(str(backend), found, expected)


def test_a_weight_of_another_device_is_not_laid_out():
    weight = Int4Weight.quantize(torch.randn(66, 40)).to("meta")
    assert int4_linear(torch.randn(3, 40, device="meta"), weight, bias=torch.randn(66, device="meta")).shape == (3, 66)
    assert not isinstance(vars(weight).get("_panels"), Panels)

"""Quantisation of activations and of weights into panels: what the shared tests do not say."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import m4ov_kernels
from m4ov_kernels import quantize_fp8, quantize_int8, requantize, rms_norm_quantize, swiglu_quantize
from m4ov_kernels.gemm.panels import Panels, lay_out
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight

from . import draws, strategies
from .conftest import SEED
from .draws import Draw, Seeded
from .operators import Call
from .operators.gemm_quantize import QUANTIZE_FP8, QUANTIZE_INT8, RMS_NORM_QUANTIZE, SWIGLU_QUANTIZE, same_bits
from .triton_blocks import DTYPES, on_device

QUANTISATIONS = (QUANTIZE_INT8, QUANTIZE_FP8, RMS_NORM_QUANTIZE, SWIGLU_QUANTIZE)
E4M3 = [float(x) for x in torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()]


def nearest(numbers: list[float], x: float) -> float:
    """Of ascending numbers at even and odd places in turn, the nearest to x ≥ 0; in the middle that at the even one."""
    above = next(i for i, number in enumerate(numbers) if number >= x)
    if above == 0:
        return numbers[0]
    low, high = Fraction(numbers[above - 1]), Fraction(numbers[above])
    to_low, to_high = Fraction(x) - low, high - Fraction(x)
    if to_low == to_high:
        return numbers[above - above % 2]
    return float(low if to_low < to_high else high)


@pytest.mark.parametrize("dtype", draws.DTYPES)
def test_the_definition_against_exact_arithmetic(dtype):
    """The nearest code, half to even, of the rounded quotient, by fractions; e4m3's subnormal numbers included."""
    x = torch.randn(6, 40).to(dtype)
    x[0] *= 1e-3
    x[0, 0] = 1.0  # far above the rest: they are subnormal in e4m3
    x[1] = torch.linspace(-448, 448, 40).round().to(dtype)  # the scale 1
    x[1, 0] = 448
    for codes, scales, largest, numbers in (
        (*quantize_int8(x), 127, [float(i) for i in range(128)]),
        (*quantize_fp8(x), 448, E4M3),
    ):
        for row in range(len(x)):
            scale = float(torch.tensor(float(x[row].abs().max())) / largest)
            assert float(scales[row]) == scale
            for element in range(x.shape[1]):
                quotient = float(torch.tensor(float(x[row, element])) / torch.tensor(scale))
                expected = math.copysign(nearest(numbers, min(abs(quotient), numbers[-1])), quotient)
                assert float(codes[row, element].float()) == expected


@pytest.mark.parametrize("largest", [127.0, 448.0])
def test_every_boundary_between_two_codes(isa, largest):
    """Quotients halfway between two codes and next to that, for scales with few and with many bits: where a product
    with the reciprocal goes wrong."""
    numbers = [float(i) for i in range(128)] if largest == 127 else E4M3
    halves = torch.tensor([(a + b) / 2 for a, b in pairwise(numbers)])
    scales = torch.cat([torch.rand(60) + 0.5, 1 + torch.arange(-4, 5) * 2.0**-23, torch.tensor([1.0, 1.5, 2.0**-95])])
    rows = []
    for scale in scales:
        near = halves * scale
        steps = [near]
        for end in (torch.inf, -torch.inf):
            step = near
            for _ in range(2):
                step = torch.nextafter(step, torch.tensor(end))
                steps.append(step)
        rows.append(torch.cat([torch.stack(steps, 1).flatten(), (scale * largest).view(1)]))
    x = torch.stack(rows)
    x = torch.cat([x, -x])
    function = quantize_int8 if largest == 127 else quantize_fp8
    got = function(x)
    with m4ov_kernels.backend("reference"):
        expected = function(x)
    for name, a, b in zip(("codes", "scales"), got, expected, strict=True):
        same_bits(name, a, b)
    assert ((got[1] / scales.repeat(2)[:, None]).log2().abs() < 1e-5).all()  # the scales that were meant


@pytest.mark.parametrize("function", [quantize_int8, quantize_fp8])
@pytest.mark.parametrize("dtype", draws.DTYPES)
def test_what_is_not_finite_and_what_is_zero(isa, function, dtype):
    x = torch.randn(5, 300).to(dtype)
    x[0, 299], x[1, 7], x[2] = torch.nan, -torch.inf, 0.0
    codes, scales = function(x)
    assert scales[:2].isnan().all()
    assert (codes[:2].float() == 0).all()
    assert float(scales[2]) == 2.0**-126
    assert scales[3:].isfinite().all()
    assert (codes[3:].float().abs().amax(1) == (127 if function is quantize_int8 else 448)).all()


def test_groups_and_blocks_are_spoilt_alone(isa):
    x = torch.randn(2, 200, 300)
    x[0, 3, 130] = torch.inf
    _, scales = quantize_fp8(x, "group")
    assert scales.shape == (2, 200, 3)
    assert scales.isnan().nonzero().tolist() == [[0, 3, 1]]
    _, scales, turned = quantize_fp8(x, "block", True)
    assert scales.shape == (4, 3)
    assert scales.isnan().nonzero().tolist() == [[0, 1]]
    assert turned.shape == (300, 400)


@pytest.mark.parametrize("dtype", draws.DTYPES)
def test_large_outputs_are_the_same(isa, dtype):
    """They are written past the caches, by other instructions."""
    rows, width = 2100, 4096
    x, other, weight = (torch.randn(*shape).to(dtype) for shape in ((rows, width), (rows, width), (width,)))
    calls = (
        lambda x, other: quantize_int8(x),
        lambda x, other: quantize_fp8(x, "group"),
        lambda x, other: quantize_fp8(x, "block")[:1],
        lambda x, other: rms_norm_quantize(x, weight, eps=1e-6, residual=other),
        lambda x, other: swiglu_quantize(x, other, dtype="fp8"),
    )
    for call in calls:
        for whole, part in zip(call(x, other), call(x[1024:1152].clone(), other[1024:1152].clone()), strict=True):
            same_bits("part", part, whole[1024:1152])


@pytest.mark.parametrize("case", QUANTISATIONS, ids=str)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_in_triton(case, data):
    """On the GPU where there is one, else interpreted."""

    def small(draw: Draw) -> Call:
        while True:
            call = case.call(draw)
            if sum(value.numel() for value in call.arguments.values() if isinstance(value, Tensor)) < 4000:
                return call

    call = on_device(data.draw(strategies.drawn(small)))
    if case.kernel_dtype(call.arguments) not in DTYPES:
        return
    with m4ov_kernels.backend("triton"):
        got = case.evaluate(call)
        case.judge(call, got)


def test_compiled_whole():
    x, weight = torch.randn(6, 40), torch.randn(40)

    def function(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        values, scales, turned = quantize_fp8(x * 2, "block", True)
        return *quantize_int8(x), values.float() * scales, turned, *rms_norm_quantize(x, weight, eps=1e-6, residual=x)

    expected = function(x, weight)
    for given_x in (x, x.clone().requires_grad_()):
        made = torch.compile(function, fullgraph=True, backend="aot_eager")(given_x, weight)
        for a, b in zip(made, expected, strict=True):
            same_bits("compiled", a.detach(), b)


def test_gradients_end_here():
    x = torch.randn(3, 8, requires_grad=True)
    for backend in (None, "reference"):
        with m4ov_kernels.backend(backend):
            for made in (quantize_int8(x), quantize_fp8(x), swiglu_quantize(x, x)):
                assert not any(tensor.requires_grad for tensor in made)


# ---- Weights into panels

SCHEMES = ("int8", "fp8-channel", "fp8-block", "fp8-tensor", "int4")


def plain(weight: Tensor, scheme: str, group_size: int, paired: bool) -> Panels:
    weight = weight.contiguous()
    if scheme == "int4":
        quantised = Int4Weight.quantize(weight, group_size=group_size)
    elif scheme == "int8":
        quantised = Int8Weight.quantize(weight)
    else:
        quantised = Fp8Weight.quantize(weight, granularity=scheme.partition("-")[2])
    return lay_out(quantised, paired=paired)


def assert_same_panels(got: Panels, expected: Panels) -> None:
    for name in ("kind", "shape", "group", "paired", "form", "zeros", "order", "input_scale", "pre_quant_scale"):
        assert getattr(got, name) == getattr(expected, name), name
    same_bits("scales", got.scales, expected.scales)
    same_bits("codes", got.codes, expected.codes)


def requantised(draw: Draw) -> None:
    scheme, group_size = draw.choice(SCHEMES), draw.choice((32, 64, 128, -1))
    paired = draw.one_in(3)
    rows = draw.integer(1, 80) if not draw.one_in(4) else draw.choice((64, 127, 128, 129, 260))
    columns = draw.integer(1, 80) if not draw.one_in(2) else draw.choice((127, 128, 129, 257, 1030, 2051, 4304))
    kind = draw.choice(("normal", "small", "large", "equal", "zeros", "denormal", "wide"))
    dtype = draw.choice(draws.DTYPES)
    weight = draws.tensor(draw, (rows * (1 + paired), columns), dtype, kind)
    if draw.one_in(3):
        weight = weight.clone(memory_format=torch.contiguous_format)
        weight[draw.integer(0, len(weight) - 1)] = 0 if draw.boolean() else 1.0
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(draw.integer(1, 3))
        out = None
        if draw.boolean():
            out = requantize(torch.ones_like(weight), scheme=scheme, group_size=group_size, paired=paired)
        got = requantize(weight, scheme=scheme, group_size=group_size, paired=paired, out=out)
    finally:
        torch.set_num_threads(threads)
    assert out is None or got is out
    assert_same_panels(got, plain(weight, scheme, group_size, paired))


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_panels_of_a_weight(isa, data):
    data.draw(strategies.drawn(requantised))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_large_panels(isa, scheme):
    """Written past the caches, and of more columns than one piece of L2 holds."""
    weight = torch.randn(2050, 4200).bfloat16()
    assert_same_panels(requantize(weight, scheme=scheme), plain(weight, scheme, 128, False))


def test_panels_of_many_seeds(isa):
    for index in range(40):
        requantised(Seeded(SEED, index))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_what_no_weight_may_be(backend):
    good = torch.randn(70, 80)
    with m4ov_kernels.backend(backend):
        for value in (torch.nan, torch.inf, -3.2e38):
            bad = good.clone()
            bad[69, 79] = value
            for scheme in SCHEMES:
                with pytest.raises(ValueError, match=r"Weight: weight must be"):
                    requantize(bad, scheme=scheme)
        faults = (
            (ValueError, "scheme", {"scheme": "int3"}),
            (ValueError, "group_size", {"scheme": "int4", "group_size": 16}),
            (TypeError, "weight", {"weight": None}),
            (ValueError, "weight", {"weight": good[0]}),
            (ValueError, "weight", {"weight": good[:0]}),
            (ValueError, "weight", {"weight": good.to("meta")}),
            (ValueError, "weight", {"weight": good[:69], "paired": True}),
            (TypeError, "out", {"out": good}),
            (ValueError, "out", {"out": requantize(good[:, :79], scheme="int8")}),
            (ValueError, "out", {"out": requantize(good, scheme="fp8-channel")}),
            (ValueError, "out", {"out": requantize(good.half(), scheme="int8")}),
        )
        for error, argument, changes in faults:
            with pytest.raises(error, match=f"requantize: {argument} must be .*; got "):
                requantize(**({"weight": good, "scheme": "int8"} | changes))


def test_weights_in_float64_and_of_any_strides_and_parameters(isa):
    weight = torch.randn(70, 90, dtype=torch.float64)
    assert_same_panels(requantize(weight, scheme="int8"), plain(weight, "int8", 128, False))
    turned = torch.nn.Parameter(torch.randn(90, 70).t())
    assert_same_panels(requantize(turned, scheme="int4"), plain(turned, "int4", 128, False))
    with pytest.raises(RuntimeError, match="backend 'native' was asked for, but"), m4ov_kernels.backend("native"):
        requantize(weight, scheme="int8")

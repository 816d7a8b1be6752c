"""Quantised weights: their definition against float64, rounding, state dicts, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight
from m4ov_kernels.gemm.weights.bits import same

from .quantized import GROUPS, SCALES, fp8_weights, generators, int4_weights, int8_weights, weights

KINDS = {"Int4Weight": Int4Weight, "Int8Weight": Int8Weight, "Fp8Weight": Fp8Weight}


def int4_by_hand(w: Int4Weight) -> Tensor:
    """(q − z)·s in float64, out of the bytes, one element at a time."""
    N, K = w.shape
    out = torch.empty(N, K, dtype=torch.float64)
    for n in range(N):
        for k in range(K):
            code = int(w.packed[n, k // 2]) >> (4 * (k % 2)) & 15
            g = int(w.g_idx[k]) if w.g_idx is not None else (0 if w.group_size == -1 else k // w.group_size)
            zero = 8 if w.zeros is None else int(w.zeros[n, g])
            out[n, k] = (code - zero) * float(w.scales[n, g])
    return out


@given(int4_weights(rows=st.integers(1, 4), columns=st.integers(1, 150)))
@settings(max_examples=40)
def test_int4_is_what_its_bytes_say(w):
    assert torch.equal(w.dequantize(torch.float64), int4_by_hand(w))


@given(int8_weights())
@settings(max_examples=25)
def test_int8_is_codes_times_scales(w):
    assert torch.equal(w.dequantize(torch.float64), w.codes.double() * w.scales.double())


@given(fp8_weights())
@settings(max_examples=40)
def test_fp8_is_values_times_scales(w):
    scale = w.scales.double()
    if w.granularity == "block":
        scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: w.shape[0], : w.shape[1]]
    assert torch.equal(w.dequantize(torch.float64), w.values.double() * scale)


@given(weights, st.sampled_from((*SCALES, None)))
@settings(max_examples=60)
def test_dequantize_rounds_once(w, dtype):
    """In every dtype: the float64 value through float32 (exact there when scales have 16 bits), then to the dtype."""
    found = w.dequantize(dtype)
    assert found.dtype is (dtype or w.scales.dtype)
    assert torch.equal(found, w.dequantize(torch.float64).float().to(found.dtype))


@given(weights)
@settings(max_examples=60)
def test_a_state_dict_is_the_weight(w):
    state = w.state_dict()
    again = type(w).from_state_dict({name: tensor.clone() for name, tensor in state.items()})
    assert again.equal(w)
    assert w.equal(again)
    assert all(same(again.state_dict()[name], tensor) for name, tensor in state.items())
    assert again.nbytes == w.nbytes == sum(v.nbytes for v in vars(w).values() if isinstance(v, Tensor))


@given(weights)
@settings(max_examples=30)
def test_a_state_dict_with_less_or_more_is_refused(w):
    state = w.state_dict()
    optional = {"weight_zero_point", "weight_g_idx", "pre_quant_scale", "input_scale"}
    for name in set(state) - optional:
        with pytest.raises(ValueError, match=name):
            type(w).from_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(ValueError, match="bias"):
        type(w).from_state_dict({**state, "bias": torch.ones(3)})


def matrices(draw: st.DrawFn) -> Tensor:
    """Float [N, K]: ordinary, subnormal, huge, and with rows and groups of zeros."""
    generator = draw(generators())
    N, K, dtype = draw(st.integers(1, 150)), draw(st.integers(1, 300)), draw(st.sampled_from(SCALES))
    values = torch.randn(N, K, generator=generator)
    size = draw(st.sampled_from((1.0, 1.0, 1e-3, 1e-7, 1e-39, 1e4, 1e37)))
    values = values * (min(size, 1e4) if dtype is torch.float16 else size)
    for where in (torch.rand(N, 1, generator=generator) < 0.2, torch.rand(1, K, generator=generator) < 0.2):
        values = values.masked_fill(where, 0)
    return values.to(dtype)


@st.composite
def _matrices(draw: st.DrawFn) -> Tensor:
    return matrices(draw)


def within_half_a_step(found: Tensor, w: Tensor, step: Tensor, low: float, high: float) -> None:
    """Every element is at its nearest code, or past the last one; in float64, with the rounding of one division."""
    exact = w.double() / step
    error = (found.double() / step - exact).abs()
    allowed = (exact - exact.clamp(low, high)).abs() + 0.5 + 4 * torch.finfo(torch.float32).eps * exact.abs()
    assert bool((error <= allowed).all()), float((error - allowed).max())


@given(_matrices(), st.sampled_from(GROUPS), st.booleans(), st.sampled_from((None, torch.float32)), st.booleans())
@settings(max_examples=60)
def test_int4_rounds_to_nearest(w, group_size, symmetric, scale_dtype, act_order):
    K = w.shape[1]
    g_idx = None
    if act_order and group_size != -1:
        g_idx = (torch.arange(K) // group_size)[torch.randperm(K)].int()
    found = Int4Weight.quantize(w, group_size=group_size, symmetric=symmetric, g_idx=g_idx, scale_dtype=scale_dtype)
    assert found.shape == w.shape
    assert found.scales.dtype is (scale_dtype or w.dtype)
    group = found.groups().long()
    step = found.scales.double()[:, group]
    zero = torch.full_like(step, 8) if symmetric else found.zeros.double()[:, group]
    value = found.dequantize(torch.float64)
    assert bool((value[w == 0] == 0).all())
    exact = w.double() / step
    error = (value / step - exact).abs()
    # What the codes' range cuts off: at most half a step for a zero point and a scale that were rounded themselves.
    cut = torch.maximum(exact - (15 - zero), -zero - exact).clamp_min(0)
    assert bool((error <= cut + 0.5 + 1e-5).all()), float((error - cut).max())
    slack = 2.0 ** (1 - {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[found.scales.dtype]) * 15
    normal = found.scales.double()[:, group] > 2.0**-14 if found.scales.dtype is torch.float16 else exact == exact
    assert bool((cut <= 0.5 + slack)[normal].all()), float(cut.max())
    assert bool(torch.isfinite(found.dequantize(torch.float32)).all())


@given(_matrices())
@settings(max_examples=30)
def test_int8_rounds_to_nearest(w):
    found = Int8Weight.quantize(w, scale_dtype=torch.float32)
    within_half_a_step(found.dequantize(torch.float64), w, found.scales.double(), -128, 127)
    assert bool((found.scales[(w == 0).all(1)] == 1).all())
    assert bool(torch.isfinite(found.dequantize(torch.float32)).all())


@given(_matrices(), st.sampled_from(("tensor", "channel", "block")))
@settings(max_examples=40)
def test_fp8_rounds_to_nearest(w, granularity):
    found = Fp8Weight.quantize(w, granularity=granularity)
    step = dataclasses.replace(found, values=torch.ones(w.shape).to(torch.float8_e4m3fn)).dequantize(torch.float64)
    # e4m3: three bits of mantissa, subnormals of 2^-9; every value is nearest among its neighbours.
    exact = (w.double() / step).clamp(-448, 448)
    spacing = 2.0 ** (torch.log2(exact.abs().clamp_min(2.0**-6)).floor() - 3)
    error = (found.values.double() - exact).abs()
    assert bool((error <= spacing / 2 * (1 + 1e-5)).all())
    assert bool(torch.isfinite(found.dequantize(torch.float32)).all())
    if float(w.abs().max()) > 1e-30:
        assert float(found.values.float().abs().max()) == 448


def test_ties_go_to_the_even_code():
    row = torch.tensor([[7.5, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -7.5]])
    assert Int4Weight.quantize(row, group_size=-1).codes().tolist() == [[15, 8, 10, 10, 8, 6, 6, 0]]
    row = torch.tensor([[127.5, 0.5, 1.5, -2.5, -127.5]])
    assert Int8Weight.quantize(row).codes.tolist() == [[127, 0, 2, -2, -128]]
    row = torch.tensor([[448.0, 17.0, 19.0, -17.0, 2.0**-10]])  # halfway between 16 and 18, 18 and 20, 0 and 2^-9
    assert Fp8Weight.quantize(row).values.float().tolist() == [[448.0, 16.0, 20.0, -16.0, 0.0]]


BAD = {"NaN": float("nan"), "infinity": float("inf"), "the end of float32": torch.finfo(torch.float32).max}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_quantize_names_what_it_cannot(kind, value):
    w = torch.randn(6, 70)
    w[3, 5] = value
    with pytest.raises(ValueError, match="weight must be"):
        kind.quantize(w)
    for wrong in (torch.randn(0, 3), torch.randn(3, 0), torch.randn(3)):
        with pytest.raises(ValueError, match="weight must be"):
            kind.quantize(wrong)
    for wrong in (torch.ones(3, 3, dtype=torch.int8), "weight", None):
        with pytest.raises(TypeError, match="weight must be"):
            kind.quantize(wrong)
    with pytest.raises(ValueError, match="scale_dtype must be"):
        kind.quantize(torch.randn(3, 3), scale_dtype=torch.float64)
    with pytest.raises(ValueError, match="scale_dtype must be"):  # a scale past 65504
        kind.quantize(torch.full((2, 3), 1e9), scale_dtype=torch.float16)


def test_a_weight_has_one_form():
    codes, scales = torch.zeros(3, 70, dtype=torch.uint8), torch.ones(3, 3)
    natural = Int4Weight.from_codes(codes, scales, group_size=32, g_idx=(torch.arange(70) // 32).int())
    assert natural.g_idx is None
    assert natural.equal(Int4Weight.from_codes(codes, scales, group_size=32))
    assert not natural.equal(natural.with_zeros())
    assert natural.with_zeros().without_zeros().equal(natural)
    with pytest.raises(ValueError, match="zeros must be 8 throughout"):
        dataclasses.replace(natural, zeros=torch.zeros(3, 3, dtype=torch.uint8)).without_zeros()


def _int4(**changes):
    rest = {"group_size": 32, "zeros": torch.full((3, 3), 7, dtype=torch.uint8), "g_idx": torch.arange(67).int() % 3}
    made = Int4Weight.from_codes(torch.ones(3, 67, dtype=torch.uint8), torch.ones(3, 3), **rest)
    return dataclasses.replace(made, **changes)


def _int8(**changes):
    return dataclasses.replace(Int8Weight(torch.ones(3, 5, dtype=torch.int8), torch.ones(3, 1)), **changes)


def _fp8(**changes):
    values = torch.ones(3, 130).to(torch.float8_e4m3fn)
    return dataclasses.replace(Fp8Weight(values, torch.ones(1, 2), "block", torch.ones(1)), **changes)


WRONG = [
    (_int4, "packed", torch.zeros(3, 35, dtype=torch.uint8)),
    (_int4, "packed", torch.full((3, 36), 17, dtype=torch.uint8)),
    (_int4, "packed", torch.zeros(3, 36, dtype=torch.int8)),
    (_int4, "packed", torch.zeros(36, 3, dtype=torch.uint8).T),
    (_int4, "scales", torch.ones(3, 2)),
    (_int4, "scales", torch.ones(3, 3, dtype=torch.float64)),
    (_int4, "scales", torch.full((3, 3), float("inf"))),
    (_int4, "zeros", torch.full((3, 3), 16, dtype=torch.uint8)),
    (_int4, "zeros", torch.zeros(3, 2, dtype=torch.uint8)),
    (_int4, "g_idx", torch.full((67,), 3).int()),
    (_int4, "g_idx", torch.full((67,), -1).int()),
    (_int4, "g_idx", torch.zeros(67, dtype=torch.int64)),
    (_int4, "g_idx", torch.zeros(66, dtype=torch.int32)),
    (_int4, "pre_quant_scale", torch.ones(66)),
    (_int4, "pre_quant_scale", torch.full((67,), float("nan"))),
    (_int4, "group_size", 16),
    (_int4, "group_size", None),
    (_int4, "in_features", 0),
    (_int8, "codes", torch.ones(3, 5)),
    (_int8, "codes", torch.ones(3, dtype=torch.int8)),
    (_int8, "scales", torch.ones(3)),
    (_int8, "scales", torch.ones(1, 1)),
    (_fp8, "values", torch.ones(3, 130)),
    (_fp8, "values", torch.full((3, 130), 0xFF, dtype=torch.uint8).view(torch.float8_e4m3fn)),
    (_fp8, "scales", torch.ones(1, 1)),
    (_fp8, "scales", torch.ones(2, 1)),
    (_fp8, "granularity", "row"),
    (_fp8, "input_scale", torch.ones(())),
    (_fp8, "input_scale", torch.full((1,), float("nan"))),
]


@pytest.mark.parametrize(("make", "argument", "value"), WRONG)
def test_a_field_that_is_wrong_is_named(make, argument, value):
    make()
    with pytest.raises((TypeError, ValueError), match=rf"{argument} must be"):
        make(**{argument: value})


@pytest.mark.parametrize("make", [_int4, _int8, _fp8])
def test_frozen(make):
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().scales = torch.ones(1)


def test_bytes_that_begin_anywhere():
    """What PyTorch calls contiguous may begin at any byte and have any stride where a size is 1."""
    w = Int4Weight.from_codes(torch.arange(16).byte().view(1, 16), torch.ones(1, 1), group_size=32)
    for offset in range(4):
        room = torch.zeros(1, 13, dtype=torch.uint8)
        odd = room[:, offset : offset + 8]
        odd.copy_(w.packed)
        moved = dataclasses.replace(w, packed=odd)
        assert moved.equal(w)
        assert Int4Weight.from_state_dict(moved.state_dict()).equal(w)


@pytest.mark.parametrize("stride", [(1, 40), (96, 2)])
def test_quantize_takes_any_strides(stride):
    weight = torch.randn(60 * 96).as_strided((40, 48), stride)
    assert not weight.is_contiguous()
    for kind, options in ((Int4Weight, {"group_size": 32}), (Int8Weight, {}), (Fp8Weight, {"granularity": "block"})):
        for dtype in (torch.float32, torch.bfloat16):
            strided = weight.to(dtype)
            assert kind.quantize(strided, **options).equal(kind.quantize(strided.contiguous(), **options))

"""Panels: what they hold, that they are kept, in pairs and halves, and that a linear of them is one of their weight."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import m4ov_kernels
from m4ov_kernels import int4_linear, int8_linear
from m4ov_kernels.gemm import panels
from m4ov_kernels.gemm.linear import EPILOGUES
from m4ov_kernels.gemm.panels import PANEL, PLACES, lay_out
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight

from . import draws, strategies
from .numerics import assert_accurate
from .quantized import drawn_weight
from .test_gemm_linear import CPU, FUNCTIONS, kinds, weight_of
from .test_invariance import assert_same_bits, on_threads

KINDS = {"int4": Int4Weight, "int8": Int8Weight, "fp8": Fp8Weight}


@given(data=st.data(), kind=kinds, paired=st.booleans())
@settings(max_examples=60)
def test_panels_hold_the_weight_as_they_say(data, kind, paired):
    """Read off by the definition, place by place."""
    weight = data.draw(strategies.drawn(lambda draw: weight_of(draw, kind, even=paired)))
    held, (N, K) = weight.panels(paired=paired), weight.shape
    P, places = held.codes.shape[0], PLACES[kind]
    assert held.codes.is_contiguous()
    assert held.codes.shape[2:] == (PANEL, 2 if kind == "fp8" else 4)
    end = held.codes.shape[1] * places  # Kp
    if kind == "int4":
        nibbles = torch.stack((held.codes & 15, held.codes >> 4), -1).flatten(3)  # [P, words, 64, 8]
    else:
        nibbles = held.codes
    codes = nibbles.transpose(1, 2).reshape(P, PANEL, end)  # of each place
    groups = torch.arange(end) // held.group
    scales = held.scales.transpose(1, 2)[..., groups]  # [P, 64, Kp]
    if kind == "int4":
        zeros = 8.0 if held.zeros is None else held.zeros.transpose(1, 2)[..., groups].double()
        values = codes.double() - zeros
    else:
        values = codes.double() - 128 if kind == "int8" else codes.view(torch.float8_e4m3fn).double()
    dense = values * scales.double()
    order = torch.arange(end) if held.order is None else held.order.long()
    there = (order >= 0) & (order < K)
    assert sorted(order[there].tolist()) == list(range(K))
    matrix = torch.zeros(P, PANEL, K, dtype=torch.float64)
    matrix[..., order[there]] = dense[..., there]
    half = N // 2 if paired else N
    for p in range(P):
        first = p // 2 * PANEL if paired else p * PANEL
        rows = max(0, min(PANEL, half - first))
        first += half if paired and p % 2 else 0
        assert torch.equal(matrix[p, :rows], weight.dequantize(torch.float64)[first : first + rows])
        assert not held.scales[p, :, rows:].any()
    assert math.ceil(half / PANEL) * (2 if paired else 1) == P
    nothing = {"int4": 0, "int8": 128, "fp8": 0}[kind]
    assert (codes[..., ~there] == nothing).all()


@given(data=st.data(), kind=kinds, paired=st.booleans())
@settings(max_examples=30)
def test_panels_are_the_same_without_a_compiled_kernel(isa, data, kind, paired):
    weight = data.draw(strategies.drawn(lambda draw: weight_of(draw, kind, even=paired)))
    with on_threads(data.draw(st.integers(1, 3))):
        packed = lay_out(weight, paired=paired)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels, "native_extension", lambda: (None, "not here"))
        plain = lay_out(weight, paired=paired)
    for name, value in vars(plain).items():
        found = getattr(packed, name)
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value


@given(data=st.data(), kind=kinds, paired=st.booleans())
@settings(max_examples=40)
def test_panels_give_the_weight_back(data, kind, paired):
    weight = data.draw(strategies.drawn(lambda draw: weight_of(draw, kind, even=paired)))
    panels = lay_out(weight, paired=paired)
    again = panels.weight()
    assert again.equal(weight)
    assert torch.equal(panels.dequantize(torch.float64), weight.dequantize(torch.float64))
    theirs = {value.untyped_storage().data_ptr() for value in vars(weight).values() if isinstance(value, torch.Tensor)}
    for value in vars(panels).values():
        assert not isinstance(value, torch.Tensor) or value.untyped_storage().data_ptr() not in theirs


def test_panels_are_kept_until_the_weight_changes():
    weight = Int4Weight.quantize(torch.randn(70, 64), group_size=32)
    held = weight.panels()
    assert weight.panels() is held
    assert weight.panels(paired=True) is weight.panels(paired=True) is not held
    x = torch.randn(3, 64)
    before = int4_linear(x, weight)
    weight.scales.mul_(2)
    assert weight.panels() is not held
    assert_accurate("doubled", int4_linear(x, weight), before * 2, before.double() * 2)
    for other in (replace(weight), weight.to("cpu"), copy.copy(weight), copy.deepcopy(weight)):
        assert other.equal(weight)
        assert other.panels() is not weight.panels()
    assert len(pickle.dumps(weight)) < weight.nbytes + 2000
    assert pickle.loads(pickle.dumps(weight)).equal(weight)


def test_panels_made_inside_modes_outlive_them():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for mode in (torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta")):
        weight = Int8Weight.quantize(torch.randn(5, 8))
        with mode:
            panels = weight.panels()
        assert type(panels.codes) is torch.Tensor
        assert panels.device == CPU
        assert not panels.codes.is_inference()
        x = torch.randn(3, 8, requires_grad=True)
        int8_linear(x, weight).sum().backward()
        assert x.grad is not None


def test_panels_of_tensors_without_memory():
    with torch.device("meta"):
        panels = lay_out(Int8Weight(torch.empty(70, 9, dtype=torch.int8), torch.empty(70, 1)))
    assert panels.device.type == "meta"
    assert panels.codes.shape == (2, 3, PANEL, 4)


def test_panels_refuse_what_they_cannot_hold():
    with pytest.raises(ValueError, match=r"Panels: weight must be of an even number of rows.*\[5, 8\]"):
        lay_out(Int8Weight.quantize(torch.randn(5, 8)), paired=True)
    with pytest.raises(TypeError, match="Panels: weight must be an Int4Weight, Int8Weight or Fp8Weight"):
        lay_out(torch.randn(5, 8))


def test_panels_stand_for_their_weight(isa):
    for kind, function in FUNCTIONS.items():
        weight = drawn_weight(kind, 66, 40, draws.Seeded(1))
        x, panels = torch.randn(5, 40), lay_out(weight)
        for epilogue in (None, *EPILOGUES):
            for backend in ("reference", None):
                with m4ov_kernels.backend(backend):
                    ours, theirs = function(x, panels, epilogue=epilogue), function(x, weight, epilogue=epilogue)
                assert_accurate(f"{kind} {epilogue}", ours, theirs, theirs.double())


@given(data=st.data(), kind=kinds)
@settings(max_examples=30)
def test_paired_panels_stand_for_their_weight(isa, data, kind):
    weight = data.draw(strategies.drawn(lambda draw: weight_of(draw, kind, even=True)))
    x, bias = torch.randn(data.draw(st.integers(1, 6)), weight.shape[1]), torch.randn(weight.shape[0])
    pair = weight.panels(paired=True)
    ours, theirs = (FUNCTIONS[kind](x, held, bias=bias, epilogue="swiglu") for held in (pair, weight))
    assert_same_bits("swiglu", ours, theirs)


@given(data=st.data(), kind=kinds)
@settings(max_examples=30)
def test_gradients_of_paired_panels(isa, data, kind):
    """Whatever padding is between gates and ups."""
    half, K, rows = (data.draw(st.integers(1, most)) for most in (150, 90, 6))
    weight = KINDS[kind].quantize(torch.randn(2 * half, K) / K**0.5)
    tensors = torch.randn(rows, K), torch.randn(2 * half), torch.randn(rows, half)
    grad = torch.randn(rows, half)

    def gradients(held, dtype: torch.dtype, backend: str | None):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        with m4ov_kernels.backend(backend):
            result = FUNCTIONS[kind](leaves[0], held, bias=leaves[1], residual=leaves[2], epilogue="swiglu")
            return result.detach(), *torch.autograd.grad(result, leaves, grad.to(dtype))

    exact, plain = gradients(weight, torch.float64, "reference"), gradients(weight, torch.float32, "reference")
    for ours in (gradients(weight.panels(paired=True), torch.float32, name) for name in (None, "reference")):
        for name, *found in zip(("result", "x", "bias", "residual"), ours, plain, exact, strict=True):
            assert_accurate(name, *found, torch.full_like(found[2], 8 + 8 * float(found[2].abs().max())))


@given(data=st.data(), kind=kinds)
@settings(max_examples=30)
def test_a_pair_of_panels_and_its_halves(data, kind):
    half, K = data.draw(st.integers(1, 150) | st.sampled_from([128, 256])), data.draw(st.integers(1, 90))
    granularity = data.draw(st.sampled_from(("tensor", "channel", "block")))
    options = {"int4": {"group_size": 32, "symmetric": data.draw(st.booleans())}, "fp8": {"granularity": granularity}}
    both = [lay_out(KINDS[kind].quantize(torch.randn(half, K), **options.get(kind, {}))) for _ in range(2)]
    pair = panels.pair_of(*both)
    if kind == "fp8" and granularity == "block" and half % 128:
        assert pair is None  # blocks begin anew with the second half
        return
    assert torch.equal(pair.dequantize(), torch.cat([part.dequantize() for part in both]))
    x = torch.randn(3, K)
    for found, expected in zip(panels.halves_of(pair, both[0].form), both, strict=True):
        assert found.weight().equal(expected.weight())
        assert_same_bits("strided", FUNCTIONS[kind](x, found), FUNCTIONS[kind](x, expected))
        for name, value in vars(expected).items():
            mine = getattr(panels.own(found), name)
            assert (mine.is_contiguous() and mine.equal(value)) if isinstance(value, torch.Tensor) else mine == value


def test_panels_that_are_no_pair():
    matrix, order = torch.randn(64, 64), (torch.randperm(64) // 32).int()
    int4 = [
        Int4Weight.quantize(matrix),
        Int4Weight.quantize(matrix[:63]),
        Int4Weight.quantize(matrix, group_size=32),
        Int4Weight.quantize(matrix, group_size=32, symmetric=False),
        Int4Weight.quantize(matrix.bfloat16()),
        replace(Int4Weight.quantize(matrix), pre_quant_scale=torch.ones(64)),
        Int8Weight.quantize(matrix),
        Fp8Weight.quantize(matrix),
        Fp8Weight.quantize(matrix, granularity="tensor"),
        replace(Fp8Weight.quantize(matrix), input_scale=torch.ones(1)),
        replace(Fp8Weight.quantize(matrix), input_scale=torch.full((1,), 2.0)),
    ]
    for i, one in enumerate(int4):
        for j, other in enumerate(int4):
            assert (panels.pair_of(lay_out(one), lay_out(other)) is not None) == (i == j)
    ordered = lay_out(Int4Weight.quantize(matrix, group_size=32, g_idx=order))
    paired = lay_out(int4[0], paired=True)
    assert panels.pair_of(ordered, ordered) is None
    assert panels.pair_of(paired, paired) is None

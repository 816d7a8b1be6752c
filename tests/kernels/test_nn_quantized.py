"""Int4Linear, Int8Linear, Fp8Linear: one copy of the weight, exact in every state dict, in the place of nn.Linear."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import m4ov_kernels
from m4ov_kernels.gemm.panels import Panels
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight
from m4ov_kernels.nn import Fp8Linear, Int4Linear, Int8Linear, SwiGLUMLP
from m4ov_kernels.nn.quantized_pair import quantized_swiglu

from . import strategies
from .numerics import assert_accurate
from .operators import CASES
from .quantized import drawn_weight

LAYERS = {"int4": Int4Linear, "int8": Int8Linear, "fp8": Fp8Linear}
kinds = st.sampled_from(tuple(LAYERS))


@pytest.fixture(params=list(LAYERS))
def layer(request):
    return LAYERS[request.param].from_linear(nn.Linear(40, 70, dtype=torch.bfloat16))


def same_tensors(a, b) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name].contiguous().flatten().view(torch.uint8).equal(b[name].contiguous().flatten().view(torch.uint8))
        for name in a
    )


@given(data=st.data(), kind=kinds, dtype=strategies.dtypes)
@settings(max_examples=25)
def test_it_is_the_function_of_its_weight(data, kind, dtype):
    def hold(draw) -> None:
        arguments = CASES[f"{kind}_linear"].arguments(draw)
        weight, x, bias = arguments["weight"], arguments["x"], arguments["bias"]
        options = {"activation": arguments["activation"]} if kind != "int8" else {}
        layer = LAYERS[kind](weight, bias, **options)
        function = CASES[f"{kind}_linear"].function
        torch.testing.assert_close(layer(x), function(x, weight, bias=bias, **options), rtol=0, atol=0, equal_nan=True)
        assert layer.quantized_weight.equal(weight)
        assert (layer.in_features, layer.out_features) == (weight.shape[1], weight.shape[0])

    data.draw(strategies.drawn(hold))


@given(data=st.data(), kind=kinds, assign=st.booleans(), meta=st.booleans())
@settings(max_examples=40)
def test_state_dicts_are_the_weights_own(data, kind, assign, meta):
    def hold(draw) -> None:
        N, K = draw.integer(1, 90), draw.integer(1, 90)
        weight, other = (drawn_weight(kind, N, K, draw) for _ in range(2))
        bias = torch.randn(N) if draw.boolean() else None
        model = nn.ModuleDict({"proj": LAYERS[kind](weight, bias)})
        state = model.state_dict()
        expected = {f"proj.{name}": value for name, value in weight.state_dict().items()}
        assert same_tensors(state, expected if bias is None else {**expected, "proj.bias": bias})
        target = nn.ModuleDict({"proj": LAYERS[kind](other, None if bias is None else torch.randn(N))})
        if meta and assign:
            target = target.to("meta")
        before = {name: value.clone() for name, value in state.items()}
        assert not any(target.load_state_dict(state, assign=assign))
        assert target["proj"].quantized_weight.equal(weight)
        assert same_tensors(target.state_dict(), state)
        x = torch.randn(3, K)
        torch.testing.assert_close(target["proj"](x), model["proj"](x), rtol=0, atol=0, equal_nan=True)
        for value in vars(target["proj"].held).values():  # what it holds is its own
            if isinstance(value, torch.Tensor):
                value.zero_()
        assert same_tensors(state, before)

    data.draw(strategies.drawn(hold))


def test_what_does_not_fit_is_said(layer):
    state = layer.state_dict()
    missing = next(name for name in state if name != "bias")
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{missing}"'):
        layer.load_state_dict({name: value for name, value in state.items() if name != missing})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "weight_other"'):
        layer.load_state_dict({**state, "weight_other": torch.ones(2)})
    with pytest.raises(RuntimeError, match=r"scales must be finite"):
        layer.load_state_dict({**state, "weight_scale": state["weight_scale"] * torch.nan})
    wider = type(layer).from_linear(nn.Linear(48, 70, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"size mismatch for \*: \[70, 48\] in the checkpoint, \[70, 40\] here"):
        layer.load_state_dict(wider.state_dict())
    assert not layer.load_state_dict({"bias": state["bias"]}, strict=False).unexpected_keys
    assert same_tensors(layer.state_dict(), state)


def test_any_form_of_the_weight_loads():
    matrix = torch.randn(70, 64)
    layer = Int4Linear(Int4Weight.quantize(matrix))
    other = Int4Weight.quantize(matrix, group_size=32, symmetric=False, g_idx=(torch.randperm(64) // 32).int())
    layer.load_state_dict(other.state_dict())
    assert layer.quantized_weight.equal(other)
    assert repr(layer) == (
        "Int4Linear(in_features=64, out_features=70, bias=False, group_size=32, symmetric=False, act_order=True, "
        "activation='auto')"
    )


def test_repr():
    linear = nn.Linear(8, 6)
    assert repr(Int8Linear.from_linear(linear)) == (
        "Int8Linear(in_features=8, out_features=6, bias=True, activation='int8')"
    )
    assert repr(Fp8Linear.from_linear(linear, granularity="block", activation="bf16").to("meta")) == (
        "Fp8Linear(in_features=8, out_features=6, bias=True, granularity='block', activation='bf16')"
    )


def test_one_copy_and_nothing_to_train(layer):
    assert isinstance(layer.held, Panels)
    assert not [name for name, _ in layer.named_parameters() if name != "bias"]
    assert not list(layer.buffers())
    assert layer.held.nbytes < 1.9 * layer.quantized_weight.nbytes  # 70 rows are two panels
    x = torch.randn(3, 40, dtype=torch.bfloat16, requires_grad=True)
    layer(x).float().square().sum().backward()
    assert layer.bias.grad is not None
    assert x.grad is not None


def test_conversions_leave_the_scales(layer):
    weight, x = layer.quantized_weight, torch.randn(5, 40)
    expected = layer(x)
    for convert in (nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16), nn.Module.float):
        assert convert(layer) is layer
        assert layer.quantized_weight.equal(weight)
        assert layer.weight.dtype is layer.compute_dtype is layer.bias.dtype
        assert torch.equal(layer.weight, weight.dequantize(layer.compute_dtype))
    layer.to(memory_format=torch.channels_last)
    assert torch.equal(layer(x), expected)
    with pytest.raises(TypeError, match="moved only, not converted"):
        layer.type(torch.float32)


def test_moves(layer):
    weight = layer.quantized_weight
    away = copy.deepcopy(layer).to("meta")
    assert away.held.device.type == away.bias.device.type == "meta"
    assert not isinstance(away.held, Panels)
    assert away.weight.device.type == "meta"
    assert away(torch.randn(3, 40, device="meta", dtype=torch.bfloat16)).shape == (3, 70)
    with pytest.raises(NotImplementedError, match="to_empty"):
        away.to("cpu")
    with pytest.warns(UserWarning, match="loads with assign=True; nothing is done"):
        away.load_state_dict(layer.state_dict())
    back = away.to_empty(device="cpu")
    assert isinstance(back.held, Panels)
    assert not back.weight.any()
    back.load_state_dict(layer.state_dict())
    assert back.quantized_weight.equal(weight)
    assert same_tensors(back.state_dict(), layer.state_dict())


def test_made_of_meta_tensors_and_loaded(layer):
    made = type(layer).from_linear(nn.Linear(40, 70, dtype=torch.bfloat16, device="meta"))
    assert made.held.device.type == "meta"
    assert made.compute_dtype is torch.bfloat16
    made.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 40).bfloat16()
    assert torch.equal(made(x), layer(x))


def test_copies_pickles_and_saves(layer):
    x = torch.randn(3, 40).bfloat16()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert other.held.codes.data_ptr() != layer.held.codes.data_ptr()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert same_tensors(torch.load(file, weights_only=True), layer.state_dict())
    layer.share_memory()
    assert layer.held.codes.is_shared()


def test_in_the_place_of_a_linear():
    for dtype in (torch.float32, torch.bfloat16):
        linear = nn.Linear(64, 70, dtype=dtype).eval()
        x = torch.randn(2, 9, 64, dtype=dtype)
        for made, allowed in (
            (Int4Linear.from_linear(linear, group_size=32, symmetric=False, activation="bf16"), 0.15),
            (Int8Linear.from_linear(linear), 0.02),
            (Fp8Linear.from_linear(linear), 0.05),
        ):
            assert made.bias is linear.bias
            assert not made.training
            exact = linear(x)
            assert (made(x) - exact).norm() < allowed * exact.norm()
            assert (made.weight - linear.weight).norm() < allowed * linear.weight.norm()


def test_autocast_and_biases_of_another_dtype(layer):
    x = torch.randn(5, 40)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, layer(x.bfloat16()))
    assert_accurate("float32", layer(x), layer.float()(x), layer.double()(x.double()))


def test_compiled_whole():
    for layer in (layer.from_linear(nn.Linear(40, 70)) for layer in LAYERS.values()):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for rows in (3, 9):
            x = torch.randn(rows, 40, requires_grad=True)
            torch.testing.assert_close(compiled(x), layer(x))
            (grad,) = torch.autograd.grad(compiled(x).sum(), x)
            torch.testing.assert_close(grad, torch.autograd.grad(layer(x).sum(), x)[0])
        layer.load_state_dict(type(layer).from_linear(nn.Linear(40, 70)).state_dict())
        torch.testing.assert_close(compiled(x), layer(x))


def test_inside_invariant_backends_are_the_functions():
    layer = Int8Linear.from_linear(nn.Linear(40, 70))
    with (
        m4ov_kernels.invariant(),
        m4ov_kernels.backend("reference"),
        pytest.raises(RuntimeError, match="int8_linear: invariance was asked for"),
    ):
        layer(torch.randn(2, 40))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Int4Linear(torch.ones(6, 8)), TypeError, "Int4Linear: weight must be an Int4Weight"),
        (lambda: Int4Linear(INT4, activation="w8"), ValueError, "activation must be one of 'auto', 'bf16'"),
        (lambda: Int4Linear(INT4, torch.ones(7)), ValueError, r"bias must be \[6\] on cpu; got float32 tensor \[7\]"),
        (lambda: Int8Linear(INT4), TypeError, "Int8Linear: weight must be an Int8Weight"),
        (lambda: Int8Linear(INT8, torch.ones(6).int()), TypeError, "bias must be a bfloat16"),
        (lambda: Fp8Linear(FP8, compute_dtype=torch.int8), TypeError, "compute_dtype must be a floating dtype"),
        (lambda: Fp8Linear(FP8, activation="int8"), ValueError, "activation must be one of 'auto', 'bf16', 'fp8'"),
        (lambda: Fp8Linear.from_linear(nn.Conv1d(1, 1, 1)), TypeError, "linear must be an nn.Linear"),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


INT4, INT8, FP8 = (kind.quantize(torch.ones(6, 8)) for kind in (Int4Weight, Int8Weight, Fp8Weight))


def test_a_gate_and_an_up_projection_are_one_linear(layer):
    """One copy of their weights, the same state, until one of them is called by itself."""
    mlp = SwiGLUMLP(40, 70)
    for name, linear in (("gate_proj", nn.Linear(40, 70)), ("up_proj", nn.Linear(40, 70))):
        setattr(mlp, name, type(layer).from_linear(linear))
    gate, up, x = mlp.gate_proj, mlp.up_proj, torch.randn(5, 40)
    saved, nbytes = copy.deepcopy(mlp.state_dict()), gate.held.nbytes
    apart = m4ov_kernels.swiglu(gate(x).detach(), up(x).detach(), numerics="fp32")
    with torch.no_grad():
        together = quantized_swiglu(gate, up, x)
        torch.testing.assert_close(together, apart)
        assert gate.pair is up.pair is not None
        assert gate.held.codes.untyped_storage().data_ptr() == up.held.codes.untyped_storage().data_ptr()
        assert gate.held.nbytes == nbytes
        assert same_tensors(mlp.state_dict(), saved)
        again = copy.deepcopy(mlp)
        assert torch.equal(quantized_swiglu(again.gate_proj, again.up_proj, x), together)
        assert torch.equal(mlp(x), mlp.down_proj(together))
        again.gate_proj.load_state_dict(up.state_dict())  # another weight: no pair with what was
        both = m4ov_kernels.swiglu(up(x), up(x), numerics="fp32")
        torch.testing.assert_close(quantized_swiglu(again.gate_proj, again.up_proj, x), both)
    torch.testing.assert_close(m4ov_kernels.swiglu(gate(x), up(x), numerics="fp32"), apart)
    assert gate.pair is up.pair is None
    assert gate.held.codes.is_contiguous()


def test_a_gate_and_an_up_projection_that_stay_apart(layer):
    linear, x = nn.Linear(40, 70), torch.randn(5, 40)
    make = type(layer).from_linear
    hooked = make(linear)
    hooked.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        for other in (linear, hooked, make(nn.Linear(40, 70, bias=False)), make(nn.Linear(40, 72))):
            assert quantized_swiglu(make(linear), other, x) is None
        with m4ov_kernels.invariant():
            assert quantized_swiglu(make(linear), make(linear), x) is None
    assert quantized_swiglu(make(linear), make(linear), x) is None  # the bias is trained

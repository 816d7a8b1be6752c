"""Which implementation serves a linear of a quantised weight on a GPU: asked of ``dispatch`` as if there were one, with
the compiled CUDA kernels and without Triton."""

from __future__ import annotations

import importlib.util
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import m4ov_kernels
from m4ov import doctor
from m4ov_kernels import dispatch, fp8_linear, int4_linear, int8_linear
from m4ov_kernels.gemm import QUANTIZED_LINEAR, linear, native
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight

GPU, BF16 = torch.device("cuda", 0), torch.bfloat16
FEW = ("int4", 4, False, "bf16", "none")
DECLINED = {
    ("int4", 65, False, "bf16", "none"): "64 rows at most; got 65",
    ("int4", 4, True, "bf16", "none"): "no act-order",
    ("int4", 4, False, "fp8", "none"): "got int4 by fp8",
    ("int4", 4, False, "bf16", "gelu"): "got 'gelu'",
    ("int8", 4, False, "int8", "none"): "got int8 by int8",
    ("fp8", 4, False, "bf16", "none"): "got fp8 by bf16",
}


@pytest.fixture
def gpu(monkeypatch):
    """A build with CUDA kernels; Triton is installed if ``gpu()`` says so."""
    if not dispatch.native_extension()[0]:
        pytest.skip("native.py needs the compiled extension")
    found, triton = importlib.util.find_spec, SimpleNamespace(installed=False)
    monkeypatch.setattr(dispatch, "native_extension", lambda: (SimpleNamespace(cuda_targets=lambda: ["sm_90a"]), ""))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" and not triton.installed else found(name)
    )
    monkeypatch.setattr(QUANTIZED_LINEAR, "_table", {})
    return triton


def chosen(*call):
    implementation = QUANTIZED_LINEAR.select(GPU, BF16, *call)
    return "reference" if implementation is None else implementation.backend


def test_what_the_cuda_kernels_have(gpu):
    assert chosen(*FEW) == "native"
    assert QUANTIZED_LINEAR.select(GPU, BF16, *FEW).fwd is native.quantized_linear_fwd
    with m4ov_kernels.backend("native"):
        assert chosen(*FEW) == "native"


@pytest.mark.parametrize(("call", "reason"), DECLINED.items())
def test_what_they_have_not(gpu, call, reason):
    """The reference serves, or Triton; not whoever was asked for by name."""
    assert chosen(*call) == "reference"
    assert chosen(*FEW) == "native"  # the choice before is no one's but that call's
    expected = f"quantized_linear: backend 'native' was asked for, but on a GPU .*{reason}"
    with m4ov_kernels.backend("native"), pytest.raises(RuntimeError, match=expected):
        chosen(*call)
    gpu.installed = True
    QUANTIZED_LINEAR._table.clear()
    if importlib.util.find_spec("triton"):
        assert chosen(*call) == chosen(*FEW) == "triton"


def test_the_cpu_declines_nothing():
    for call in (FEW, *DECLINED):
        implementation = QUANTIZED_LINEAR.select(torch.device("cpu"), BF16, *call)
        assert implementation is QUANTIZED_LINEAR.select(torch.device("cpu"), BF16)


def calls():
    """Of the front door: a function, its weight, rows of its input, options, and who serves."""
    matrix = torch.randn(64, 256)
    plain = Int4Weight.quantize(matrix)
    ordered = Int4Weight.quantize(matrix, group_size=32, g_idx=torch.randperm(256).int() // 32)
    yield int4_linear, plain, 3, {}, "native"
    yield int4_linear, plain, 64, {"activation": "bf16"}, "native"
    yield int4_linear, plain, 65, {}, "reference"
    yield int4_linear, plain, 65, {"activation": "bf16"}, "reference"
    yield int4_linear, plain, 3, {"activation": "int8"}, "reference"
    yield int4_linear, plain, 3, {"epilogue": "swiglu"}, "reference"
    yield int4_linear, ordered, 3, {}, "reference"
    yield int8_linear, Int8Weight.quantize(matrix), 3, {}, "reference"
    yield fp8_linear, Fp8Weight.quantize(matrix), 3, {"activation": "bf16"}, "reference"


def test_the_front_door_asks_before_it_calls(gpu, monkeypatch):
    """On tensors of a GPU without memory: a kernel's result is its registered shape, and the reference, which needs
    PyTorch's own kernels, is only seen to be called."""
    ran = []
    monkeypatch.setattr(linear.reference, "quantized_linear", lambda x, *_: ran.append("reference") or x)
    registered = QUANTIZED_LINEAR.registered_fwd
    monkeypatch.setattr(QUANTIZED_LINEAR, "registered_fwd", lambda *a: ran.append("native") or registered(*a))
    for function, weight, rows, options, expected in calls():
        tensors = {f.name: getattr(weight, f.name) for f in fields(weight)}
        tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        with FakeTensorMode():
            there = {name: torch.empty(t.shape, dtype=t.dtype, device=GPU) for name, t in tensors.items()}
            function(torch.empty(rows, 256, dtype=BF16, device=GPU), replace(weight, **there), **options)
        assert ran == [expected]
        ran.clear()


def test_doctor_tells_function_by_function(gpu):
    told = {
        served.operator: served for served in doctor.serving() if (served.device, served.dtype) == ("cuda", "bfloat16")
    }
    if torch.cuda.is_available():
        assert told["int4_linear"].runs == "native"
    else:
        assert told["int4_linear"].why == "no GPU; with one: native (triton: triton is not installed)"
    assert "reference (native: on a GPU it has int4 weights by bf16 activations; got int8" in told["int8_linear"].why

"""What ``m4ov doctor`` says is what happens."""

from __future__ import annotations

import importlib
import io
import re

import pytest
import torch
from rich.console import Console

import m4ov_kernels
from m4ov import doctor
from m4ov_kernels.dispatch import FUNCTIONS, native_extension
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight

CALLS = {
    "rms_norm": lambda dtype, device: m4ov_kernels.rms_norm(
        torch.randn(3, 8, dtype=dtype, device=device), torch.rand(8, dtype=dtype, device=device), eps=1e-6
    ),
    "swiglu": lambda dtype, device: m4ov_kernels.swiglu(
        torch.randn(3, 8, dtype=dtype, device=device), torch.randn(3, 8, dtype=dtype, device=device)
    ),
    "layer_norm": lambda dtype, device: m4ov_kernels.layer_norm(
        torch.randn(3, 8, dtype=dtype, device=device), torch.rand(8, dtype=dtype, device=device), None, eps=1e-6
    ),
    "gelu": lambda dtype, device: m4ov_kernels.gelu(torch.randn(3, 8, dtype=dtype, device=device)),
    "geglu": lambda dtype, device: m4ov_kernels.geglu(
        torch.randn(3, 8, dtype=dtype, device=device), torch.randn(3, 8, dtype=dtype, device=device)
    ),
    "linear_cross_entropy": lambda dtype, device: m4ov_kernels.linear_cross_entropy(
        torch.randn(3, 8, dtype=dtype, device=device),
        torch.randn(16, 8, dtype=dtype, device=device),
        torch.tensor([1, -100, 3], device=device),
    ),
    "linear_logprob": lambda dtype, device: m4ov_kernels.linear_logprob(
        torch.randn(3, 8, dtype=dtype, device=device),
        torch.randn(16, 8, dtype=dtype, device=device),
        torch.tensor([1, -100, 3], device=device),
    ),
    "linear_kl": lambda dtype, device: m4ov_kernels.linear_kl(
        *(torch.randn(rows, 8, dtype=dtype, device=device) for rows in (3, 16, 3, 16))
    ),
    "int4_linear": lambda dtype, device: m4ov_kernels.int4_linear(
        torch.randn(3, 8, dtype=dtype, device=device), Int4Weight.quantize(torch.randn(16, 8)).to(device)
    ),
    "int8_linear": lambda dtype, device: m4ov_kernels.int8_linear(
        torch.randn(3, 8, dtype=dtype, device=device), Int8Weight.quantize(torch.randn(16, 8)).to(device)
    ),
    "fp8_linear": lambda dtype, device: m4ov_kernels.fp8_linear(
        torch.randn(3, 8, dtype=dtype, device=device), Fp8Weight.quantize(torch.randn(16, 8)).to(device)
    ),
    "varlen_attention": lambda dtype, device: m4ov_kernels.varlen_attention(
        *torch.randn(3, 5, 2, 8, dtype=dtype, device=device), torch.tensor([0, 2, 5], device=device), causal=True
    ),
    "qk_norm_mrope": lambda dtype, device: m4ov_kernels.qk_norm_mrope(
        *torch.randn(2, 3, 2, 8, dtype=dtype, device=device),
        *torch.rand(2, 8, dtype=dtype, device=device),
        torch.arange(3, device=device).expand(3, -1),
        mrope_section=[2, 1, 1],
        theta=1e4,
        eps=1e-6,
        interleaved=True,
    ),
    "vision_rope": lambda dtype, device: m4ov_kernels.vision_rope(
        *torch.randn(2, 4, 2, 8, dtype=dtype, device=device), torch.tensor([[1, 2, 2]], device=device), merge_size=2
    ),
    "interpolate_position_embeddings": lambda dtype, device: m4ov_kernels.interpolate_position_embeddings(
        torch.randn(9, 8, dtype=dtype, device=device), torch.tensor([[1, 2, 2]], device=device), merge_size=2
    ),
    "scatter_vision": lambda dtype, device: m4ov_kernels.scatter_vision(
        *torch.randn(2, 3, 8, dtype=dtype, device=device), torch.arange(3, device=device)
    ),
    "deepstack_add": lambda dtype, device: m4ov_kernels.deepstack_add(
        *torch.randn(2, 3, 8, dtype=dtype, device=device), torch.arange(3, device=device)
    ),
    "route_topk": lambda dtype, device: m4ov_kernels.route_topk(torch.randn(3, 8, dtype=dtype, device=device), top_k=2),
    "permute": lambda dtype, device: m4ov_kernels.permute(
        torch.randn(3, 8, dtype=dtype, device=device),
        torch.tensor([[0, 1]] * 3, dtype=torch.int32, device=device),
        2,
    ),
    "unpermute": lambda dtype, device: m4ov_kernels.unpermute(
        torch.randn(6, 8, dtype=dtype, device=device),
        torch.arange(6, dtype=torch.int32, device=device).view(3, 2),
        torch.rand(3, 2, dtype=torch.promote_types(dtype, torch.float32), device=device),
    ),
    "grouped_linear": lambda dtype, device: m4ov_kernels.grouped_linear(
        torch.randn(3, 8, dtype=dtype, device=device),
        torch.randn(2, 5, 8, dtype=dtype, device=device),
        torch.tensor([0, 1, 3], device=device),
    ),
    "quantize_int8": lambda dtype, device: m4ov_kernels.quantize_int8(torch.randn(3, 8, dtype=dtype, device=device)),
    "quantize_fp8": lambda dtype, device: m4ov_kernels.quantize_fp8(torch.randn(3, 8, dtype=dtype, device=device)),
    "rms_norm_quantize": lambda dtype, device: m4ov_kernels.rms_norm_quantize(
        torch.randn(3, 8, dtype=dtype, device=device), torch.ones(8, dtype=dtype, device=device), eps=1e-6
    ),
    "swiglu_quantize": lambda dtype, device: m4ov_kernels.swiglu_quantize(
        *torch.randn(2, 3, 8, dtype=dtype, device=device)
    ),
    "mrope_positions": lambda dtype, device: m4ov_kernels.mrope_positions(
        torch.ones(5, dtype=dtype, device=device),
        cu_seqlens=torch.tensor([0, 2, 5], device=device),
        image_token_id=7,
        video_token_id=8,
        merge_size=2,
    ),
}


@pytest.fixture(scope="module")
def report():
    return doctor.collect()


def test_every_operator_is_told_for_every_device_and_dtype(report):
    assert CALLS.keys() == FUNCTIONS.keys()
    told = {(served.operator, served.device, served.dtype) for served in report.operators}
    assert told == {
        (name, device, str(dtype).removeprefix("torch."))
        for name, operator in FUNCTIONS.items()
        for device in ("cpu", "cuda")
        for dtype in operator.dtypes
    }


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name in CALLS for dtype in FUNCTIONS[name].dtypes])
def test_what_runs_is_what_it_says(report, monkeypatch, name, dtype):
    """Watch every implementation's raw forward and the reference while the public function runs."""
    operator, ran = FUNCTIONS[name], []

    def watch(module, attribute, label):
        real = getattr(module, attribute)
        monkeypatch.setattr(module, attribute, lambda *a, **k: (ran.append(label), real(*a, **k))[1])

    reference = importlib.import_module(f"m4ov_kernels.{operator.family}.reference")
    watch(reference, operator.name, "reference")
    for backend in operator.backends:
        if operator.unavailable(backend, "cpu", dtype) is None:
            watch(importlib.import_module(f"m4ov_kernels.{operator.family}.{backend}"), f"{operator.name}_fwd", backend)
    monkeypatch.setattr(operator, "_table", {})  # select again, through the watched modules
    with torch.no_grad():
        CALLS[name](dtype, "cpu")
    said = next(s for s in report.operators if (s.operator, s.device, s.dtype) == (name, "cpu", str(dtype)[6:]))
    assert ran == [said.runs]


def test_a_device_that_is_not_here_is_not_claimed(report):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    on_gpu = [served for served in report.operators if served.device == "cuda"]
    assert {served.runs for served in on_gpu} == {"none"}
    assert dict(report.facts["CUDA"])["GPU"] == "none that PyTorch can use"


def test_a_backend_that_cannot_serve_is_told_as_an_error():
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with m4ov_kernels.backend("native"):
        served = [s for s in doctor.serving() if s.device == "cuda"]
        assert {s.runs for s in served} == {"error"}
        assert all("backend 'native' was asked for, but" in s.why for s in served)


def test_the_instruction_set_is_the_one_in_use(report):
    extension, reason = native_extension()
    facts = dict(report.facts["kernels"])
    if extension is None:
        assert facts["compiled extension"] == f"none: {reason}"
        return
    before = extension.isa()
    assert facts["in use"].split()[0] == before
    try:
        for isa in extension.isas():
            extension.set_isa(isa)
            told = doctor.collect()
            assert dict(told.facts["kernels"])["in use"].split()[0] == isa
            assert all(s.why.endswith(isa) for s in told.operators if s.device == "cpu" and s.runs == "native")
    finally:
        extension.set_isa(before)


def test_threads_are_those_of_a_call():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert dict(doctor.collect().facts["threads"])["PyTorch"].startswith("1 in a call")
    finally:
        torch.set_num_threads(before)


def test_the_openmp_runtimes_are_those_mapped(report):
    runtimes = doctor.openmp_runtimes()
    if runtimes is None:
        pytest.skip("this system does not show what is mapped")
    assert any("libgomp" in file or "libomp" in file or "libiomp" in file for file in runtimes)
    assert dict(report.facts["threads"])["OpenMP runtimes mapped"].startswith(str(len(runtimes)))
    many = [advice for advice in report.advice if "OpenMP runtimes" in advice]
    assert bool(many) == (len(runtimes) > 1)


def test_versions_are_those_imported(report):
    versions = dict(report.facts["versions"])
    assert versions["torch"] == torch.__version__
    assert re.match(r"3\.\d+\.\d+, ", versions["Python"])


def test_it_renders_at_any_width(report):
    for width in (40, 200):
        out = io.StringIO()
        doctor.render(report, Console(file=out, width=width))
        assert "what will run" in out.getvalue().replace("\n", " ")

"""The contract's points 3, 5 and 7 for every operator: registration, choice of implementation, differentiation."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import m4ov_kernels
from m4ov_kernels import (
    deepstack_add,
    geglu,
    gelu,
    interpolate_position_embeddings,
    layer_norm,
    linear_cross_entropy,
    qk_norm_mrope,
    rms_norm,
    scatter_vision,
    swiglu,
    varlen_attention,
    vision_rope,
)
from m4ov_kernels.dispatch import FUNCTIONS, OPERATORS, Operator
from m4ov_kernels.head import linear_logprob

from . import gemm_samples, kl_samples, moe_samples


def norm_case(dtype=torch.float32):
    x, weight = torch.randn(6, 40, dtype=dtype), torch.randn(40, dtype=dtype)
    return lambda x, w: rms_norm(x, w, eps=1e-6, residual=x * 2)[0], [x, weight]


def layer_norm_case(dtype=torch.float32):
    tensors = [torch.randn(*shape, dtype=dtype) for shape in ((6, 40), (40,), (40,))]
    return lambda x, w, b: layer_norm(x, w, b, eps=1e-6, residual=x * 2)[0], tensors


def gelu_case(dtype=torch.float32):
    tensors = [torch.randn(6, 40, dtype=dtype), torch.randn(40, dtype=dtype)]
    return lambda x, b: gelu(x, bias=b, approximate="tanh"), tensors


def geglu_case(dtype=torch.float32):
    return geglu, [torch.randn(6, 40, dtype=dtype), torch.randn(6, 40, dtype=dtype)]


def swiglu_case(dtype=torch.float32):
    return swiglu, [torch.randn(6, 40, dtype=dtype), torch.randn(6, 40, dtype=dtype)]


def head_case(dtype=torch.float32):
    target = torch.tensor([1, 2, -100, 3, 4, 10])
    tensors = [torch.randn(6, 16, dtype=dtype), torch.randn(11, 16, dtype=dtype)]
    options = {"weight": torch.rand(11), "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0}
    return lambda h, w: linear_cross_entropy(h, w, target, **options), tensors


def logprob_case(dtype=torch.float32):
    targets = torch.tensor([1, 2, -100, 3, 4, 10])
    tensors = [torch.randn(*shape, dtype=dtype) * 0.3 for shape in ((6, 16), (11, 16), (11,))]

    def function(h, w, b):
        found = linear_logprob(h, w, targets, bias=b, temperature=0.7, entropy=True)
        return torch.stack((found.logprob, found.logsumexp, found.entropy)) / 4

    return function, tensors


def attention_case(dtype=torch.float32):
    tensors = [torch.randn(11, heads, 24, dtype=dtype) for heads in (4, 2, 2)]
    bounds = torch.tensor([0, 4, 4, 11])
    return lambda q, k, v: varlen_attention(q, k, v, bounds, causal=True), tensors


def rope_case(dtype=torch.float32):
    tensors = [torch.randn(5, heads, 16, dtype=dtype) for heads in (4, 2)]
    tensors += [torch.randn(16, dtype=dtype) for _ in range(2)]
    positions = torch.arange(15).view(3, 5)
    options = {"mrope_section": [4, 2, 2], "theta": 1e4, "eps": 1e-6, "interleaved": True}
    return lambda *t: torch.cat(qk_norm_mrope(*t, positions, **options), 1), tensors


def vision_rope_case(dtype=torch.float32):
    tensors = [torch.randn(8, 3, 16, dtype=dtype) for _ in range(2)]
    grid = torch.tensor([[1, 2, 2], [1, 2, 2]])
    return lambda q, k: torch.cat(vision_rope(q, k, grid, merge_size=2), 1), tensors


def scatter_case(dtype=torch.float32):
    positions = torch.tensor([1, 4, 3])
    tensors = [torch.randn(2, 3, 40, dtype=dtype), torch.randn(3, 40, dtype=dtype)]
    return lambda x, features: scatter_vision(x, features, positions), tensors


def deepstack_case(dtype=torch.float32):
    positions = torch.tensor([1, 4, 3])
    tensors = [torch.randn(2, 3, 40, dtype=dtype), torch.randn(3, 40, dtype=dtype)]
    return lambda x, features: deepstack_add(x, features, positions), tensors


def interpolate_case(dtype=torch.float32):
    grid_thw = torch.tensor([[1, 4, 6], [2, 2, 2]])
    tensors = [torch.randn(9, 40, dtype=dtype), torch.randn(32, 40, dtype=dtype)]
    return lambda table, x: interpolate_position_embeddings(table, grid_thw, merge_size=2, hidden_states=x), tensors


CASES = {
    "rms_norm": norm_case,
    "layer_norm": layer_norm_case,
    "gelu": gelu_case,
    "geglu": geglu_case,
    "swiglu": swiglu_case,
    "linear_cross_entropy": head_case,
    "linear_logprob": logprob_case,
    "linear_kl": kl_samples.case,
    "int4_linear": gemm_samples.int4_case,
    "int8_linear": gemm_samples.int8_case,
    "fp8_linear": gemm_samples.fp8_case,
    "varlen_attention": attention_case,
    "qk_norm_mrope": rope_case,
    "vision_rope": vision_rope_case,
    "scatter_vision": scatter_case,
    "deepstack_add": deepstack_case,
    "interpolate_position_embeddings": interpolate_case,
    **moe_samples.CASES,
}


@pytest.fixture(params=sorted(name for name, operator in FUNCTIONS.items() if operator.differentiable))
def case(request):
    return CASES[request.param]


def value_and_grads(function, tensors):
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*tensors)
    return out.detach(), *torch.autograd.grad(out.square().sum(), tensors)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def test_compiled_whole_equals_eager(case):
    function, tensors = case()
    expected = value_and_grads(function, tensors)
    for backend, dynamic in (("aot_eager", False), ("aot_eager", True), ("inductor", False)):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
        for a, b in zip(value_and_grads(compiled, tensors), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_compiled_under_each_backend(case):
    function, tensors = case()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    native = value_and_grads(compiled, tensors)
    with m4ov_kernels.backend("reference"):
        reference = value_and_grads(compiled, tensors)
    for a, b in zip(native, reference, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_before_any_other_call_and_then_under_another_backend():
    """In a process of its own: nothing has been chosen yet, so that the choice itself is traced."""
    code = """
import threading, torch, m4ov_kernels
from m4ov_kernels import swiglu
gate, up = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")

def check():
    for name in (None, "reference", None):
        with m4ov_kernels.backend(name):
            torch.testing.assert_close(compiled(gate, up), swiglu(gate, up))
            compiled(gate, up).sum().backward()
    done.append(True)

done = []
compiled(gate, up)
thread = threading.Thread(target=check)
thread.start()
thread.join()
check()
assert len(done) == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_activation_checkpointing(case):
    function, tensors = case()
    saved = value_and_grads(lambda *t: checkpoint(function, *t, use_reentrant=False), tensors)
    assert_same(saved, value_and_grads(function, tensors))


QKV = (torch.randn(6, 4, 8), torch.randn(6, 2, 8), torch.randn(6, 2, 8))
DECODE = (torch.randn(3, 2, 8).bfloat16(), *torch.randn(2, 6, 1, 8).bfloat16())
BOUNDS = (torch.tensor([0, 1, 3]), torch.tensor([0, 4, 6], dtype=torch.int32))
ROPE, VLLM = ([2, 1, 1], 1e4, 1e-6), (1e4, 1e-6, False, 6, "vllm")
# Two samples: text and an image of one merged patch; text and a video of one frame of two.
IDS, TYPES, TWO = torch.tensor([5, 91, 5, 5, 92, 92]), torch.tensor([0, 1, 0, 0, 2, 2]), torch.tensor([0, 2, 6])
ONE_EACH = (torch.tensor([[1, 2, 2]]), torch.tensor([[1, 2, 4]]))
PLACES, GRIDS = torch.tensor([4, 0]), torch.tensor([[1, 2, 4], [2, 2, 2]])
BACK = (1.0, 0.0, -100, None, False, 0, 7, True, True, False)
ENTROPY_BACK = (0.5, 3.0, 2, 4, True, 0, 7, True, False, True)
CALLER = "linear_cross_entropy"
HEAD = (torch.randn(5, 8), torch.randn(7, 8), torch.tensor([1, 6, 0, 2, 3]))
RAW_SAMPLES = {
    **{
        f"{name}_fwd": [
            (torch.randn(5, 8), torch.randn(2, 8), PLACES),
            (torch.randn(2, 8, 3).bfloat16().mT, torch.randn(0, 8).bfloat16(), PLACES[:0]),
        ]
        for name in ("scatter_vision", "deepstack_add")
    },
    "scatter_vision_bwd": [
        (torch.randn(5, 8), PLACES, True, True),
        (torch.randn(2, 8, 3).mT, PLACES, False, True),
        (torch.randn(5, 8), PLACES, True, False),
    ],
    "deepstack_add_bwd": [(torch.randn(5, 8), PLACES), (torch.randn(2, 8, 3).mT, PLACES)],
    "interpolate_position_embeddings_fwd": [
        (torch.randn(9, 8), GRIDS, torch.randn(16, 8), 16, 2, "hf"),
        (torch.randn(9, 8).bfloat16(), GRIDS, None, 16, 1, "fp32"),
    ],
    "interpolate_position_embeddings_bwd": [(torch.randn(16, 8), GRIDS, 9, 2), (torch.randn(8, 16).t(), GRIDS, 1, 1)],
    "linear_logprob_fwd": [
        (*HEAD, None, None, 1.0, 0.0, -100, None, False, False, False, 0, 0, 7, 0),
        (*HEAD, torch.randn(7), torch.rand(7), 0.5, 3.0, 2, 4, True, True, True, 3, 0, 7, 1 << 20, CALLER),
    ],
    "linear_logprob_bwd": [
        (*HEAD, None, None, torch.rand(2, 5), torch.randn(0), torch.randn(0), torch.randn(5), None, None, None, *BACK),
        (
            *HEAD,
            torch.randn(7),
            torch.rand(7),
            torch.rand(2, 5),
            torch.rand(5),
            torch.randn(0),
            *torch.randn(4, 5),
            *ENTROPY_BACK,
        ),
    ],
    **kl_samples.RAW,
    **gemm_samples.RAW,
    **moe_samples.RAW,
    "varlen_attention_fwd": [
        (*QKV, torch.tensor([0, 2, 6]), None, 4, 4, True, 0.5),
        (*DECODE, *BOUNDS, 2, 4, False, 0.5),
    ],
    "varlen_attention_bwd": [
        (
            torch.randn(6, 4, 8),
            *QKV,
            torch.randn(6, 4, 8),
            torch.rand(2, 4, 6) + 0.5,
            torch.tensor([0, 6]),
            None,
            6,
            6,
            True,
            1.0,
        ),
        (DECODE[0], *DECODE, DECODE[0], torch.rand(2, 2, 3) + 0.5, *BOUNDS, 2, 4, False, 0.5),
    ],
    "rms_norm_fwd": [
        (torch.randn(3, 8), torch.randn(8), None, 1e-6, "hf"),
        (torch.randn(2, 3, 8).bfloat16(), torch.randn(8).bfloat16(), torch.randn(2, 3, 8).bfloat16(), 1e-6, "fp32"),
        (torch.randn(8, 3).t(), torch.randn(8), None, 1e-6, "vllm"),
    ],
    "rms_norm_bwd": [
        (torch.randn(3, 8), None, torch.randn(3, 8), torch.randn(8), torch.rand(3) + 0.5, "hf", True),
        (torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 8), torch.randn(8), torch.rand(3), "hf", False),
    ],
    "layer_norm_fwd": [
        (torch.randn(3, 8), torch.randn(8), torch.randn(8), None, 1e-6, "hf"),
        (torch.randn(2, 3, 8).bfloat16(), None, None, torch.randn(2, 3, 8).bfloat16(), 1e-6, "fp32"),
        (torch.randn(8, 3).t(), torch.randn(8), None, None, 1e-6, "vllm"),
    ],
    "layer_norm_bwd": [
        (torch.randn(3, 8), None, torch.randn(3, 8), torch.randn(8), torch.rand(3), torch.rand(3), True, True),
        (torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 8), None, torch.rand(3), torch.rand(3), False, True),
    ],
    "gelu_fwd": [(torch.randn(3, 8), torch.randn(8), "tanh"), (torch.randn(8, 3).t(), None, "none")],
    "gelu_bwd": [
        (torch.randn(3, 8), torch.randn(3, 8), torch.randn(8), "tanh", True),
        (torch.randn(3, 8), torch.randn(8, 3).t(), None, "none", False),
    ],
    "geglu_fwd": [(torch.randn(3, 8), torch.randn(3, 8), "tanh", "hf")],
    "geglu_bwd": [(torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 8), "none", "fp32")],
    "qk_norm_mrope_fwd": [
        (
            torch.randn(3, 2, 8),
            torch.randn(3, 1, 8),
            *torch.rand(2, 8),
            torch.arange(9).view(3, 3),
            *ROPE,
            True,
            8,
            "hf",
        ),
        (*torch.randn(2, 2, 2, 8).bfloat16(), None, None, torch.arange(2), [], 1e4, 0.0, False, 4, "fp32"),
        (torch.randn(2, 8, 3).mT, torch.randn(2, 3, 8), None, torch.rand(8), torch.arange(2), [], *VLLM),
    ],
    "qk_norm_mrope_bwd": [
        (*torch.randn(4, 3, 2, 8), *torch.rand(2, 8), torch.arange(9).view(3, 3), *ROPE, True, 8, "hf", True, True),
        (*torch.randn(2, 3, 2, 8), None, None, None, None, torch.arange(3), [], 1e4, 0.0, False, 8, "hf", False, False),
    ],
    "vision_rope_fwd": [
        (*torch.randn(2, 4, 2, 8), torch.tensor([[1, 2, 2]]), None, 2, 1e4, "hf"),
        (*torch.randn(2, 4, 2, 8), None, torch.arange(8, dtype=torch.int32).view(4, 2), 2, 1e4, "fp32"),
    ],
    "vision_rope_bwd": [(*torch.randn(2, 4, 2, 8), torch.tensor([[1, 2, 2]]), None, 2, 1e4, "hf")],
    "mrope_positions_fwd": [
        (IDS, TWO, TYPES, *ONE_EACH, None, 91, 92, 2),
        (IDS, TWO.int(), None, *ONE_EACH, torch.tensor([0.5]), 91, 92, 2),
        (IDS, TWO, TYPES.int() * 0, None, None, None, 91, 92, 2),
    ],
    "swiglu_fwd": [(torch.randn(3, 8), torch.randn(3, 8), "hf")],
    "swiglu_bwd": [(torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 8), "fp32")],
    "quantize_int8_fwd": [(torch.randn(3, 8),), (torch.randn(2, 8, 3).bfloat16().mT,), (torch.randn(0, 8),)],
    "quantize_fp8_fwd": [
        (torch.randn(3, 8), "row", False),
        (torch.randn(2, 3, 130).bfloat16(), "group", False),
        (torch.randn(130, 140).t(), "block", True),
    ],
    "rms_norm_quantize_fwd": [
        (torch.randn(3, 8), torch.randn(8), None, 1e-6, "hf", "int8"),
        (torch.randn(2, 8), torch.randn(8), torch.randn(2, 8), 1e-6, "fp32", "fp8"),
    ],
    "swiglu_quantize_fwd": [(*torch.randn(2, 3, 8), "hf", "int8"), (*torch.randn(2, 8, 3).mT, "fp32", "fp8")],
}


def raw_names():
    for name, operator in sorted(OPERATORS.items()):
        yield f"{name}_fwd"
        if operator.differentiable:
            yield f"{name}_bwd"


@pytest.mark.parametrize("raw", raw_names())
def test_opcheck(raw):
    differentiable = raw.endswith("fwd") and OPERATORS[raw.removesuffix("_fwd")].differentiable
    for sample in RAW_SAMPLES[raw]:
        leaves = tuple(
            value.detach().clone().requires_grad_(differentiable and value.is_floating_point())
            if isinstance(value, torch.Tensor)
            else value
            for value in sample
        )
        torch.library.opcheck(getattr(torch.ops.m4ov, raw).default, leaves)


def test_fake_tensors(case):
    from torch._subclasses.fake_tensor import FakeTensorMode

    function, tensors = case(torch.bfloat16)
    real = function(*tensors)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(tensor).requires_grad_() for tensor in tensors]
        out = function(*fake)
        assert out.shape == real.shape
        assert out.dtype == real.dtype
        grads = torch.autograd.grad(out.sum(), fake)
        assert [g.shape for g in grads] == [t.shape for t in tensors]


def test_double_backward_raises_with_the_hint(case):
    function, tensors = case()
    tensors = [tensor.requires_grad_() for tensor in tensors]
    grads = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match=r"backend\('reference'\)"):
        sum(g.square().sum() for g in grads).backward()
    with m4ov_kernels.backend("reference"):
        grads = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
        sum(g.square().sum() for g in grads).backward()


def test_function_transforms(case):
    function, tensors = case()
    transformed = torch.func.grad(lambda *t: function(*t).sum())
    with pytest.raises(RuntimeError, match=r"torch.func transforms work under .*backend\('reference'\)"):
        transformed(*tensors)
    with m4ov_kernels.backend("reference"):
        assert transformed(*tensors).shape == tensors[0].shape


def test_float64_and_other_devices_are_served_by_the_reference(case):
    function, tensors = case(torch.float64)
    assert function(*tensors).dtype == torch.float64
    with pytest.raises(RuntimeError, match="backend 'native' was asked for, but it has no float64 kernels"):  # noqa: SIM117
        with m4ov_kernels.backend("native"):
            function(*tensors)


def test_an_override_is_checked_nested_and_per_thread():
    with (
        pytest.raises(ValueError, match="one of native, triton, library, reference; got 'cuda'"),
        m4ov_kernels.backend("cuda"),
    ):
        pass
    chosen = []
    operator = next(iter(OPERATORS.values()))

    def choice():
        implementation = operator.select(torch.device("cpu"), torch.float32)
        chosen.append(implementation.backend if implementation else "reference")

    with m4ov_kernels.backend("reference"):
        choice()
        with m4ov_kernels.backend("native"):
            choice()
        choice()
        thread = threading.Thread(target=choice)
        thread.start()
        thread.join()
    assert chosen == ["reference", "native", "reference", "native"]


def test_eight_threads_at_once(case):
    function, tensors = case()
    expected = value_and_grads(function, tensors)
    failures = []

    def work():
        try:
            for _ in range(20):
                assert_same(value_and_grads(function, tensors), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_importing_the_operators_imports_no_compiler():
    """torch._dynamo takes as long as torch itself; dispatch marks its constant without it, as torch.compiler would."""
    code = "import sys, m4ov_kernels; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    marked = torch.compiler.assume_constant_result(lambda: 0)
    assert vars(marked).items() <= vars(Operator._name_of).items()

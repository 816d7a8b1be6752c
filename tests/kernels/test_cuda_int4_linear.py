"""The CUDA C++ source of int4_linear, run on the CPU thread by thread (``cuda_on_cpu_ptx.h``), called as on
a GPU and judged against the dequantised weight in float64.

Stands in for a GPU where there is none: index arithmetic, the order of codes and operands, barriers, copies that arrive
late, stream-K's partial sums. It says nothing about speed, nor of what the tensor cores round within a product.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from m4ov_kernels import dispatch
from m4ov_kernels.gemm.int4_cuda import unserved
from m4ov_kernels.gemm.weights import Int4Weight

from .numerics import BEYOND, assert_accurate, logit_terms
from .quantized import SCALES, scales

if not dispatch.native_extension()[0]:
    pytest.skip("the calls go through the compiled extension's module", allow_module_level=True)
from m4ov_kernels.gemm import native_cuda

HERE = Path(__file__).parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HARNESS = """
#include "cuda_on_cpu_ptx.h"
#include "gemm/int4_linear.cu"
struct Product { float (*c)[4]; uint32_t (*a)[4], (*b)[2]; };
void product_kernel(const Product p) { m4ov::mma_bf16(p.c[threadIdx.x], p.a[threadIdx.x], p.b[threadIdx.x]); }
extern "C" {
const char* run(const m4ov::Int4Linear* a) {
  const char* error = m4ov::int4_linear_cuda(*a, nullptr);
  return error ? error : on_cpu::copies_pending() ? "a copy for which nobody waited" : nullptr;
}
size_t size() { return sizeof(m4ov::Int4Linear); }
void plan(int64_t rows, int64_t columns, int64_t width, int64_t multiprocessors, int64_t* result) {
  const m4ov::Int4LinearPlan plan = m4ov::int4_linear_cuda_plan(rows, columns, width, multiprocessors);
  result[0] = plan.blocks, result[1] = plan.partials, result[2] = plan.tiles;
}
void product(float* c, uint32_t* a, uint32_t* b) {
  const Product p{reinterpret_cast<float (*)[4]>(c), reinterpret_cast<uint32_t (*)[4]>(a),
                  reinterpret_cast<uint32_t (*)[2]>(b)};
  m4ov::launch(product_kernel, 1, dim3(32), p, nullptr);
}
void dequantize(uint32_t word, uint32_t factor, uint32_t minus, uint32_t* pairs) {
  m4ov::dequantize(word, factor, minus, *reinterpret_cast<uint32_t (*)[4]>(pairs));
}
}
"""


class Int4Linear(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("output", "input", "codes", "scales", "zeros", "bias", "residual")),
        *((name, ctypes.c_void_p) for name in ("partials", "arrivals")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "width", "input_row", "residual_row")),
        *((name, ctypes.c_int64) for name in ("group", "groups", "blocks")),
        *((name, ctypes.c_int) for name in ("scale_dtype", "dtype")),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if not shutil.which(compiler[0]):
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    for name in ("cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h"):  # all that is used is in cuda_on_cpu.h
        (folder / name).touch()
    (folder / "harness.cpp").write_text(HARNESS)
    flags = ["-std=c++17", "-O2", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    flags += ["-I", str(folder), "-I", str(HERE), "-I", str(HERE.parents[1] / "csrc")]
    subprocess.run([*compiler, *flags, "-o", folder / "cuda.so", folder / "harness.cpp"], check=True)
    library = ctypes.CDLL(str(folder / "cuda.so"))
    library.run.restype = ctypes.c_char_p
    library.size.restype = ctypes.c_size_t
    library.plan.argtypes = [ctypes.c_int64] * 4 + [ctypes.c_void_p]
    assert library.size() == ctypes.sizeof(Int4Linear)
    return library


def planned(library: ctypes.CDLL, *sizes: int) -> list[int]:
    found = (ctypes.c_int64 * 3)()
    library.plan(*sizes, found)
    return list(found)


@pytest.fixture
def multiprocessors(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """``native_cuda``, launching on the CPU; how many multiprocessors it finds is in ``count``."""
    machine, partials = SimpleNamespace(count=2), 0

    def plan(*sizes: int) -> list[int]:
        nonlocal partials
        found = planned(library, *sizes)
        partials = found[1]
        return found

    def run(addresses: tuple[int, ...], sizes: tuple[int, ...], scale_dtype: int, dtype: int, stream: int) -> None:
        ctypes.memset(addresses[7], 0xFF, 4 * partials)  # NaN, which shows where nobody wrote
        error = library.run(ctypes.byref(Int4Linear(*addresses, *sizes, scale_dtype, dtype)))
        if error:
            raise RuntimeError(error.decode())

    extension = SimpleNamespace(int4_linear_cuda_plan=plan, int4_linear_cuda=run)
    monkeypatch.setattr(native_cuda, "_C", extension)
    monkeypatch.setattr(native_cuda, "_machine", lambda device: (machine.count, 0))
    return machine


def drawn(options: Sequence[Any]) -> Any:
    return options[int(torch.randint(len(options), ()))]


def drawn_weight(columns: int, width: int, group: int, zeros: bool, dtype: torch.dtype, wild: bool) -> Int4Weight:
    """``wild``: scales of every size that the dtype has, and groups of zeros."""
    shape = (columns, 1 if group == -1 else -(-width // group))
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    values = scales(shape, dtype, generator) if wild else (torch.rand(shape) * 0.1 + 1e-3).to(dtype)
    if wild:
        values[torch.rand(shape) < 0.1] = 0.0
    codes = torch.randint(0, 16, (columns, width), dtype=torch.uint8)
    points = torch.randint(0, 16, shape).byte() if zeros else None
    return Int4Weight.from_codes(codes, values, group_size=group, zeros=points)


def placed(values: Tensor, gap: int, shift: int) -> Tensor:
    """The same rows, ``gap`` elements apart and ``shift`` elements off a 16-byte boundary, with NaN all around."""
    rows, columns = values.shape
    buffer = torch.full((rows * (columns + gap) + shift + 64,), torch.nan, dtype=values.dtype)
    begin = (-buffer.data_ptr() % 64) // values.element_size() + shift
    view = buffer[begin : begin + rows * (columns + gap)].view(rows, columns + gap)[:, :columns]
    return view.copy_(values)


def call(weight: Int4Weight, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    columns = weight.shape[0]
    guarded = torch.full((x.shape[0] * columns + 128,), 7.0, dtype=x.dtype)
    out = guarded[64:-64].view(x.shape[0], columns).fill_(torch.nan)
    tensors = (weight.packed, weight.scales, weight.zeros, None, None, bias, residual)
    native_cuda.quantized_linear_fwd(x, *tensors, "int4", columns, weight.group_size, "bf16", "none", out=out)
    assert (guarded[:64] == 7).all()
    assert (guarded[-64:] == 7).all()
    return out


def judge(weight: Int4Weight, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
    """By the numerics rule, beside PyTorch with the weight dequantised in the same dtype; activations are rounded to
    bfloat16 for both."""
    ours, rounded = call(weight, x, bias, residual), x.to(torch.bfloat16)

    def defined(dtype: torch.dtype) -> Tensor:
        result = F.linear(rounded.to(dtype), weight.dequantize(dtype), None if bias is None else bias.to(dtype))
        return result if residual is None else result + residual.to(dtype)

    exact = defined(torch.float64)
    terms = logit_terms(rounded, weight.dequantize(torch.float64), bias)
    if residual is not None:
        terms = torch.maximum(terms, residual.double().abs())
    # A partial sum beyond the largest float32.
    past = rounded.double().abs() @ weight.dequantize(torch.float64).abs().t() > torch.finfo(torch.float32).max
    assert_accurate("output", ours, defined(x.dtype), exact, terms.masked_fill(past, BEYOND))


# Rows of one tile, of two, of several with a ragged last; columns and widths that are no multiple of anything; codes
# that are copied by 16 bytes (widths that are multiples of 32) and by 4.
ROWS = (1, 3, 8, 9, 16, 17, 33)
SHAPES = [(1, 1), (5, 7), (128, 128), (129, 300), (40, 1160), (130, 704), (257, 256)]


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize(("columns", "width"), SHAPES)
def test_products_equal_the_definition(multiprocessors, columns, width, group):
    rows, dtype = drawn(ROWS), drawn(tuple(DTYPES))
    multiprocessors.count = drawn((1, 2, 7, 132))
    weight = drawn_weight(columns, width, group, drawn((False, True)), drawn(SCALES), False)
    x = placed(torch.randn(rows, width).to(dtype), *drawn(((0, 0), (8, 0), (3, 1))))
    bias = torch.randn(columns).to(dtype) if drawn((False, True)) else None
    residual = placed(torch.randn(rows, columns).to(dtype), 3, 1) if drawn((False, True)) else None
    judge(weight, x, bias, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", SCALES)
def test_scales_and_activations_of_every_size(multiprocessors, scale_dtype, dtype):
    """Sums of a group before its scale must not overflow, nor lose bits below the normal range."""
    for group in (32, 128):
        weight = drawn_weight(70, 320, group, True, scale_dtype, True)
        info = torch.finfo(dtype)
        for magnitude in (1.0, info.max / 8, info.tiny * 4, info.tiny / 16):
            judge(weight, (torch.randn(5, 320).clamp(-4, 4) * magnitude).to(dtype))


@pytest.mark.parametrize("scale", [2.0**-126, 2.0**-140, 2.0**99, 2.0**100, 2.0**127, -0.03])
def test_one_scale(multiprocessors, scale):
    """Whole results at the ends of float32's range, where nothing larger hides an error."""
    codes = torch.randint(0, 16, (16, 160), dtype=torch.uint8)
    weight = Int4Weight.from_codes(codes, torch.full((16, 5), scale), group_size=32)
    for magnitude in (1.0, 2.0**-30, 2.0**-120, 2.0**120):
        if abs(scale) * magnitude < 2.0**100:
            judge(weight, torch.randn(2, 160) * magnitude)


def test_activations_that_are_not_finite_stay_in_their_rows(multiprocessors):
    weight = drawn_weight(33, 200, 64, True, torch.bfloat16, False)
    x = torch.randn(9, 200).bfloat16()
    expected = call(weight, x)
    x[2, 5], x[4, 199], x[8, 0] = torch.nan, torch.inf, -torch.inf
    ours = call(weight, x)
    others = [0, 1, 3, 5, 6, 7]
    assert torch.equal(ours[others], expected[others])
    assert ours[2].isnan().all()
    plain = F.linear(x.double(), weight.dequantize(torch.float64))[[4, 8]]
    assert torch.equal(ours[[4, 8]].isnan(), plain.isnan())
    assert torch.equal(ours[[4, 8]].double()[plain.isinf()], plain[plain.isinf()])


@pytest.mark.parametrize("rows", [8, 16])
def test_bits_do_not_depend_on_who_comes_last(multiprocessors, rows):
    """Blocks run in another order each time; a tile is shared by up to 16 of them."""
    multiprocessors.count = 132
    weight = drawn_weight(128, 4096, 128, False, torch.bfloat16, False)
    x = torch.randn(rows, 4096).bfloat16()
    first = call(weight, x)
    assert torch.equal(first, call(weight, x))
    judge(weight, x)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_bits_of_a_row_do_not_depend_on_its_company(multiprocessors, group):
    weight = drawn_weight(150, 520, group, True, torch.float16, False)
    x = torch.randn(35, 520).bfloat16()
    whole = call(weight, x)
    for rows in (slice(0, 1), slice(3, 10), slice(16, 32), slice(20, 35)):
        assert torch.equal(call(weight, x[rows]), whole[rows])


@pytest.mark.parametrize("group", [32, 128, -1])
def test_gradient_of_the_input(group, monkeypatch):
    monkeypatch.setattr(native_cuda, "_ELEMENTS", 1000)
    weight = drawn_weight(9, 301, group, group != 32, torch.bfloat16, False)
    for dtype in DTYPES:
        grad = torch.randn(3, 9).to(dtype)
        operands = (weight.packed, weight.scales, weight.zeros, None, "int4", 301, 301 if group == -1 else group)
        ours = native_cuda.quantized_linear_bwd(grad, *operands, out=torch.full((3, 301), torch.nan, dtype=dtype))
        exact = grad.double() @ weight.dequantize(torch.float64)
        terms = (grad.double().square() @ weight.dequantize(torch.float64).square()).sqrt()
        assert_accurate("grad_input", ours, grad @ weight.dequantize(dtype), exact, terms)


def test_no_rows(multiprocessors):
    assert call(drawn_weight(3, 8, 32, False, torch.float32, False), torch.empty(0, 8)).shape == (0, 3)


def test_operands_of_the_tensor_cores(library):
    """The layout as csrc/common/ptx.cuh puts it, against the ISA's list in cuda_on_cpu_ptx.h."""
    # Integers, so that every product and sum is exact.
    a, b, c = (torch.randint(-99, 100, size).float() for size in ((16, 16), (16, 8), (16, 8)))
    a, b = a.bfloat16(), b.bfloat16()
    lanes_a, lanes_b, lanes_c = torch.empty(32, 8).bfloat16(), torch.empty(32, 4).bfloat16(), torch.empty(32, 4)
    for lane in range(32):
        g, t = divmod(lane, 4)
        pairs = (a[g, 2 * t :], a[g + 8, 2 * t :], a[g, 2 * t + 8 :], a[g + 8, 2 * t + 8 :])
        lanes_a[lane] = torch.cat([pair[:2] for pair in pairs])
        lanes_b[lane] = torch.cat([b[2 * t : 2 * t + 2, g], b[2 * t + 8 : 2 * t + 10, g]])
        lanes_c[lane] = torch.cat([c[g, 2 * t : 2 * t + 2], c[g + 8, 2 * t : 2 * t + 2]])
    library.product(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in (lanes_c, lanes_a, lanes_b)))
    expected = c.double() + a.double() @ b.double()
    for lane in range(32):
        g, t = divmod(lane, 4)
        ours = torch.stack([lanes_c[lane, :2], lanes_c[lane, 2:]]).double()
        assert torch.equal(ours, expected[[g, g + 8], 2 * t : 2 * t + 2])


@pytest.mark.parametrize(("factor", "minus", "divisor"), [(0x3A003A00, 0xBD80, 2048.0), (0x3F803F80, 0xC300, 1.0)])
def test_nibbles_become_bfloat16_exactly(library, factor, minus, divisor):
    pairs = (ctypes.c_uint32 * 4)()
    for zero in range(16):
        codes = torch.randint(0, 16, (8,))
        word = sum(int(code) << (4 * i) for i, code in enumerate(codes))
        library.dequantize(word, factor, (minus | zero) * 0x10001, pairs)
        halves = torch.tensor([half for pair in pairs for half in (pair & 0xFFFF, pair >> 16)], dtype=torch.int32)
        values = (halves << 16).view(torch.float32) * divisor
        assert torch.equal(values, (codes[[0, 4, 1, 5, 2, 6, 3, 7]] - zero).float())


def test_plan(library):
    assert planned(library, 1, 12288, 4096, 132) == [396, 396 * 2 * 128 * 8, 96]
    assert planned(library, 16, 1024, 4096, 132) == [128, 128 * 2 * 128 * 16, 8]  # two chunks each
    assert planned(library, 33, 1, 1, 132) == [1, 3 * 2 * 128 * 16, 3]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rows": 65}, "64 rows at most; got 65"),
        ({"kind": "fp8"}, "got fp8 by bf16"),
        ({"activation": "fp8"}, "got int4 by fp8"),
        ({"act_order": True}, "no act-order"),
        ({"epilogue": "swiglu"}, "got 'swiglu'"),
    ],
)
def test_what_it_does_not_serve(given, expected):
    usual = {"rows": 64, "kind": "int4", "act_order": False, "activation": "bf16", "epilogue": "none"}
    assert unserved(**usual) is None
    assert expected in unserved(**{**usual, **given})


def test_bad_arguments_are_refused(library):
    def error(**changed: int) -> bytes:
        usual = {"rows": 2, "columns": 8, "width": 64, "input_row": 64, "group": 32, "groups": 2, "blocks": 1}
        arguments = Int4Linear(input=16, codes=16, scales=16, partials=16, arrivals=16, output=16)
        for name, value in {**usual, **changed}.items():
            setattr(arguments, name, value)
        return library.run(ctypes.byref(arguments))

    assert error(columns=0) == b"int4_linear: sizes out of range"
    assert error(blocks=2) == error(blocks=0) == b"int4_linear: blocks not as planned"
    assert error(input=8) == error(input_row=68) == b"int4_linear: rows of the input are not 16-byte aligned"
    assert error(codes=18) == b"int4_linear: codes are not 4-byte aligned"
    assert error(partials=8) == b"int4_linear: partials are not 16-byte aligned"
    assert error(scale_dtype=3) == b"int4_linear: unknown dtype of the scales"
    assert error(dtype=-1) == b"int4_linear: unknown dtype"
    assert error(group=16) == b"int4_linear: groups of 32, 64, 128, or one for the whole row"
    assert error(groups=3) == b"int4_linear: groups do not fit"

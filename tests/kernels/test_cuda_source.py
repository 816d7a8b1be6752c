"""The CUDA C++ source of rms_norm, run on the CPU thread by thread (``cuda_on_cpu.h``), against float64.

Stands in for a GPU where there is none: index arithmetic, barriers, masks, rounding. It says nothing about speed.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m4ov_kernels.norm import reference

from .numerics import assert_accurate, gradients, leaves, rms_norm_terms

HERE = Path(__file__).parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NUMERICS = ("hf", "vllm", "fp32")
HARNESS = """
#include "cuda_on_cpu.h"
#include "norm/rms_norm.cu"
extern "C" {
const char* fwd(const m4ov::RmsNormFwd* a) { return m4ov::rms_norm_fwd_cuda(*a, nullptr); }
const char* bwd(const m4ov::RmsNormBwd* a) { return m4ov::rms_norm_bwd_cuda(*a, nullptr); }
int64_t blocks(int64_t rows, int64_t columns) { return m4ov::rms_norm_bwd_cuda_blocks(rows, columns); }
size_t fwd_size() { return sizeof(m4ov::RmsNormFwd); }
size_t bwd_size() { return sizeof(m4ov::RmsNormBwd); }
}
"""


def _fields(names: str, kind: type) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Fwd(ctypes.Structure):
    _fields_ = [
        *_fields("normed new_residual rstd hidden_states weight residual", ctypes.c_void_p),
        *_fields("rows columns hidden_stride residual_stride", ctypes.c_int64),
        ("eps", ctypes.c_float),
        *_fields("numerics dtype threads", ctypes.c_int),
    ]


class Bwd(ctypes.Structure):
    _fields_ = [
        *_fields("grad_hidden_states grad_weight partials", ctypes.c_void_p),
        *_fields("grad_normed grad_residual hidden_states weight rstd", ctypes.c_void_p),
        *_fields("rows columns grad_stride grad_residual_stride hidden_stride blocks", ctypes.c_int64),
        *_fields("dtype threads", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    for name in ("cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h"):  # all that is used is in cuda_on_cpu.h
        (folder / name).touch()
    (folder / "harness.cpp").write_text(HARNESS)
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    flags += ["-I", str(folder), "-I", str(HERE), "-I", str(HERE.parents[1] / "csrc")]
    subprocess.run([compiler, *flags, "-o", folder / "cuda.so", folder / "harness.cpp"], check=True)
    library = ctypes.CDLL(str(folder / "cuda.so"))
    library.fwd.restype = library.bwd.restype = ctypes.c_char_p
    library.blocks.restype = ctypes.c_int64
    library.blocks.argtypes = [ctypes.c_int64, ctypes.c_int64]
    assert (library.fwd_size(), library.bwd_size()) == (ctypes.sizeof(Fwd), ctypes.sizeof(Bwd))
    return library


def placed(values: Tensor, gap: int, shift: int) -> Tensor:
    """The same rows, ``gap`` elements apart and ``shift`` elements off a 16-byte boundary, with NaN all around."""
    rows, columns = values.shape
    buffer = torch.full((rows * (columns + gap) + shift + 64,), torch.nan, dtype=values.dtype)
    begin = (-buffer.data_ptr() % 64) // values.element_size() + shift
    view = buffer[begin : begin + rows * (columns + gap)].view(rows, columns + gap)[:, :columns]
    return view.copy_(values)


class Output:
    """A buffer of NaN with a canary on both sides."""

    def __init__(self, count: int, dtype: torch.dtype, shift: int = 0) -> None:
        self.buffer = torch.full((count + 128,), 7.0, dtype=dtype)
        self.begin = 64 + (-self.buffer[64:].data_ptr() % 64) // self.buffer.element_size() + shift
        self.count = count
        self.values.fill_(torch.nan)

    @property
    def values(self) -> Tensor:
        return self.buffer[self.begin : self.begin + self.count]

    def written(self) -> Tensor:
        assert (self.buffer[: self.begin] == 7).all()
        assert (self.buffer[self.begin + self.count :] == 7).all()
        return self.values


def forward(library, x, weight, residual, numerics, shift=0):
    rows, columns = x.shape
    outputs = [Output(rows * columns, x.dtype, shift) for _ in range(1 if residual is None else 2)]
    rstd = Output(rows, torch.float32)
    arguments = Fwd(
        outputs[0].values.data_ptr(),
        None if residual is None else outputs[1].values.data_ptr(),
        rstd.values.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        None if residual is None else residual.data_ptr(),
        rows,
        columns,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        1e-6,
        NUMERICS.index(numerics),
        DTYPES[x.dtype],
        0,
    )
    assert library.fwd(ctypes.byref(arguments)) is None
    return *(output.written().view(rows, columns) for output in outputs), rstd.written()


def backward(library, grad, grad_residual, x, weight, rstd, need_weight=True, shift=0, blocks=None):
    rows, columns = x.shape
    blocks = blocks or library.blocks(rows, columns)
    grad_x, grad_weight = Output(rows * columns, x.dtype, shift), Output(columns, x.dtype)
    partials = Output(blocks * (-(-columns // 32) * 32), torch.float32)
    arguments = Bwd(
        grad_x.values.data_ptr(),
        grad_weight.values.data_ptr() if need_weight else None,
        partials.values.data_ptr() if need_weight else None,
        grad.data_ptr(),
        None if grad_residual is None else grad_residual.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        rstd.data_ptr(),
        rows,
        columns,
        grad.stride(0),
        0 if grad_residual is None else grad_residual.stride(0),
        x.stride(0),
        blocks if need_weight else 0,
        DTYPES[x.dtype],
        0,
    )
    assert library.bwd(ctypes.byref(arguments)) is None
    partials.written()
    return grad_x.written().view(rows, columns), grad_weight.written()


def expected(dtype, x, weight, residual, grads, numerics):
    tensors = leaves(dtype, *(t for t in (x, weight, residual) if t is not None))
    normed, total = reference.rms_norm(*tensors[:2], 1e-6, tensors[2] if len(tensors) == 3 else None, numerics)
    outputs = [normed] if residual is None else [normed, total]
    return *outputs, *gradients(outputs, tensors[:2], [g.to(dtype) for g in grads[: len(outputs)]])


# Held in registers by one warp and by several, ragged, one column, and wider than registers hold.
WIDTHS = (1, 7, 32, 128, 129)
CASES = [*itertools.product((0, 1, 5), WIDTHS[:5]), (21, 40), (7, 1000), (5, 2048), (1, 8192), (2, 8200), (4, 8203)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), CASES)
def test_forward_and_gradients(library, rows, columns, dtype):
    numerics = NUMERICS[(rows + columns) % 3]
    gap, shift = ((0, 0), (8, 0), (3, 1))[columns % 3]
    for has_residual in (False, True):
        x, added, grad, grad_added = (placed(torch.randn(rows, columns).to(dtype), gap, shift) for _ in range(4))
        weight = placed(torch.randn(1, columns).to(dtype), 0, shift)[0]
        residual = added if has_residual else None
        grad_residual = grad_added if has_residual else None
        *outputs, rstd = forward(library, x, weight, residual, numerics, shift)
        normalised = outputs[-1] if has_residual else x
        blocks = min(rows, 3) if has_residual else None  # a few, so that each sums several rows; or as shipped
        grads = backward(library, grad, grad_residual, normalised, weight, rstd, shift=shift, blocks=blocks)
        plain = expected(dtype, x, weight, residual, (grad, grad_added), numerics)
        exact = expected(torch.float64, x, weight, residual, (grad, grad_added), numerics)
        names = (["normed", "sum"] if has_residual else ["normed"]) + ["grad_hidden_states", "grad_weight"]
        summed = grad.double() * normalised.double() * rstd.double().view(-1, 1)  # over the rows, to grad_weight
        terms = {
            "grad_hidden_states": rms_norm_terms(grad, normalised, weight, rstd),
            "grad_weight": summed.abs().sum(0),
        }
        for name, *tensors in zip(names, (*outputs, *grads), plain, exact, strict=True):
            assert_accurate(name, *tensors, terms.get(name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [128, 1024, 8200])
def test_bits_do_not_depend_on_alignment_other_rows_or_need_weight(library, columns, dtype):
    x, residual, grad = (torch.randn(5, columns).to(dtype) for _ in range(3))
    weight = torch.randn(columns).to(dtype)

    def run(rows: slice, gap: int, shift: int, need_weight: bool = True) -> list[Tensor]:
        a, b, c = (placed(t[rows], gap, shift) for t in (x, residual, grad))
        w = placed(weight[None], 0, shift)[0]
        normed, total, rstd = forward(library, a, w, b, "hf", shift)
        grad_x, grad_weight = backward(library, c, None, total, w, rstd, need_weight, shift)
        return [normed, total, rstd, grad_x, grad_weight]

    whole = run(slice(None), 0, 0)
    for a, b in zip(whole, run(slice(None), 3, 1), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole[:4], run(slice(3, 4), 0, 0, need_weight=False)[:4], strict=True):
        assert torch.equal(a[3:4], b)


def test_bad_arguments_are_refused(library):
    for blocks in (0, 6):
        arguments = Bwd(*[None] * 8, 5, 8, 8, 8, 8, blocks, 0, 0)
        arguments.grad_weight = 16
        assert library.bwd(ctypes.byref(arguments)) == b"rms_norm: blocks must be from 1 to the rows"
    arguments = Bwd(*[None] * 8, 5, 8, 8, 8, 8, 5, 0, 0)
    arguments.grad_weight, arguments.partials = 16, 8
    assert library.bwd(ctypes.byref(arguments)) == b"rms_norm: partials are not 16-byte aligned"
    assert library.fwd(ctypes.byref(Fwd(rows=1, columns=1, dtype=3))) == b"rms_norm: unknown dtype"


def test_number_of_partials(library):
    assert [library.blocks(*shape) for shape in ((0, 8), (5, 8), (4096, 4096), (10**6, 128), (10**6, 10**6))] == [
        *(1, 5, 256, 2048, 256)
    ]

"""``quantized_linear`` in Triton against its definition in float64; see ``test_triton.py``.

Interpreted, bfloat16 stores truncate: results are float32 and float16, of activations that are rounded to bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from m4ov_kernels import configs
from m4ov_kernels.gemm import reference
from m4ov_kernels.gemm import triton as gemm
from m4ov_kernels.gemm import triton_linear_launches as launches
from m4ov_kernels.gemm.triton_linear_layout import Layout, layout_of
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight

from . import quantized, strategies
from .numerics import assert_accurate, poisoned
from .triton_blocks import DEVICE, DTYPES, dtypes, row, small_blocks, tensor

__all__ = ["small_blocks"]  # a fixture of every test here
Weight = Int4Weight | Int8Weight | Fp8Weight
ACTIVATIONS = {Int4Weight: ("bf16", "int8", "fp8"), Int8Weight: ("int8",), Fp8Weight: ("bf16", "fp8")}
ROWS = st.sampled_from((1, 2, 4, 5, 16, 17, 64, 65, 70))  # of each kind of tiles, whole ones and not
EPILOGUES = ("none", "gelu", "gelu_tanh", "swiglu")


def operands(weight: Weight) -> tuple[str, tuple[Tensor | None, ...], int]:
    """Kind, the raw operator's tensors of a weight, and its group."""
    K = weight.shape[1]
    if isinstance(weight, Int4Weight):
        group = K if weight.group_size == -1 else weight.group_size
        return "int4", (weight.packed, weight.scales, weight.zeros, weight.g_idx, None), group
    if isinstance(weight, Int8Weight):
        return "int8", (weight.codes, weight.scales, None, None, None), K
    group = 128 if weight.granularity == "block" else K
    return "fp8", (weight.values.view(torch.uint8), weight.scales, None, None, weight.input_scale), group


def by_kernels(
    x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor | None, activation: str, epilogue: str
) -> Tensor:
    """Into memory full of NaN."""
    kind, tensors, group = operands(weight)
    features = weight.shape[0] // 2 if epilogue == "swiglu" else weight.shape[0]
    (out,) = poisoned(x.new_empty(x.shape[0], features))
    found = gemm.quantized_linear_fwd(
        x, *tensors, bias, residual, kind, weight.shape[0], group, activation, epilogue, out=out
    )
    assert found is out
    return found


def judge(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    epilogue: str,
    got: Tensor,
) -> None:
    def defined(dtype: torch.dtype) -> Tensor:
        wide = (None if t is None else t.to(dtype) for t in (bias, residual))
        return reference.quantized_linear(x.to(dtype), weight, *wide, activation, epilogue)

    terms = terms_of(x, weight, bias, residual, activation, epilogue)
    assert_accurate("output", got, defined(x.dtype), defined(torch.float64), terms)


def terms_of(
    x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor | None, activation: str, epilogue: str
) -> Tensor:
    """What cancels: the products of a sum (the root of the sum of their squares), the bias, the residual."""
    rows = reference.rounded(x.float(), weight, activation, torch.float64)
    wide, shift = weight.dequantize(torch.float64), 0.0 if bias is None else bias.double()
    sums = rows @ wide.t() + shift
    sizes = torch.maximum((rows.square() @ wide.square().t()).sqrt() + abs(shift), sums.abs())
    if epilogue == "swiglu":
        (gate, up), (of_gate, of_up) = sums.chunk(2, -1), sizes.chunk(2, -1)
        sizes = 1.1 * of_gate * up.abs() + F.silu(gate).abs() * of_up
    elif epilogue != "none":
        sizes = 1.13 * sizes
    return sizes if residual is None else sizes + residual.double().abs()


@st.composite
def weights(draw: st.DrawFn) -> Weight:
    weight = draw(st.one_of(quantized.int4_weights(pre_quant=st.just(False)), quantized.int8_weights(), small_fp8()))
    if weight.scales.dtype is torch.bfloat16 and DEVICE == "cpu":  # whose subnormal numbers the interpreter loses
        weight = replace(weight, scales=weight.scales.clamp_min(torch.finfo(torch.bfloat16).tiny))
    return weight.to(DEVICE)


@st.composite
def calls(draw: st.DrawFn) -> tuple:
    """Arguments of ``by_kernels``."""
    weight = draw(weights())
    rows, dtype, (N, K) = draw(ROWS), draw(dtypes), weight.shape
    magnitude = draw(st.sampled_from((1.0, 1.0, 1.0, 1e-4, 300.0)))
    x = tensor((rows, K), dtype, draw(strategies.layouts), magnitude)
    activation = draw(st.sampled_from(ACTIVATIONS[type(weight)]))
    epilogue = draw(st.sampled_from(EPILOGUES if N % 2 == 0 else EPILOGUES[:3]))
    bias = tensor((N,), dtype, draw(strategies.layouts)) if draw(st.booleans()) else None
    residual = None
    if draw(st.booleans()):
        residual = tensor((rows, N // 2 if epilogue == "swiglu" else N), dtype, draw(strategies.layouts))
    return x, weight, bias, residual, activation, epilogue


@st.composite
def small_fp8(draw: st.DrawFn) -> Fp8Weight:
    """Blocks in both directions, but not many."""
    weight = draw(quantized.fp8_weights())
    if weight.granularity != "block":
        return weight
    rows = draw(st.sampled_from((2, 40, 130)))
    values, count = weight.values[:rows].contiguous(), -(-min(rows, weight.shape[0]) // 128)
    return Fp8Weight(values, weight.scales[:count].contiguous(), "block", weight.input_scale)


@given(call=calls())
@settings(max_examples=20, deadline=None)
def test_against_float64(call):
    judge(*call, by_kernels(*call))


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels of other architectures than the GPU's")
@pytest.mark.parametrize("bits", [False, True], ids=["e4m3", "e4m3 by bits"])
@given(call=calls())
@settings(max_examples=12, deadline=None)
def test_of_every_architecture(bits, call):
    """Tiles by descriptors where there are some, float16 in place of e4m3 where there is none, K in parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "DESCRIPTORS", ("cpu",))
        patch.setattr(launches, "BITS", ("cpu",) if bits else ())
        patch.setattr(launches, "_SPLIT_STEPS", 1)
        patch.setattr(launches, "_processors", lambda device: 16)
        got = by_kernels(*call)
    judge(*call, got)


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels of other architectures than the GPU's")
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("form", ["int8", "channel", "block"])
def test_tiles_by_descriptors(form, epilogue, monkeypatch):
    monkeypatch.setattr(launches, "DESCRIPTORS", ("cpu",))
    made = []
    of_architecture = launches.table_of
    monkeypatch.setattr(launches, "table_of", lambda *a: made.append(of_architecture(*a)) or made[-1])
    full = torch.randn(256 if epilogue == "swiglu" else 152, 272, device=DEVICE)  # 128 pairs, and no whole tiles
    weight = Int8Weight.quantize(full) if form == "int8" else Fp8Weight.quantize(full, granularity=form)
    x, bias = (torch.randn(shape, device=DEVICE).half() for shape in ((67, 272), full.shape[:1]))
    residual = torch.randn(67, 128 if epilogue == "swiglu" else 152, device=DEVICE).half()
    for parts, extra in ((2, (None, None)), (4, (bias, residual))):
        call = (x, weight, *extra, "int8" if form == "int8" else "fp8", epilogue)
        blocks = {"BLOCK_N": 32, "BLOCK_M": 32, "BLOCK_K": 128, "PARTS": parts, "GROUP": 2}
        with configs.override(row("quantized_linear_bytes_many_descriptors", None, **blocks)):
            judge(*call, by_kernels(*call))
    assert made == ["quantized_linear_bytes_many_descriptors"] * 2


@pytest.mark.parametrize("granularity", ["channel", "block"])
@pytest.mark.parametrize("width", [33, 144, 4304 // 8, 3420 // 4])
def test_the_widths_of_vision_towers(width, granularity):
    weight = Fp8Weight.quantize(torch.randn(36, width, device=DEVICE), granularity=granularity)
    for rows in (3, 66):
        x = torch.randn(rows, width, device=DEVICE)
        judge(x, weight, None, None, "fp8", "none", by_kernels(x, weight, None, None, "fp8", "none"))


def special_rows(width: int) -> Tensor:
    x = torch.randn(12, width, device=DEVICE) * torch.logspace(-42, 30, 12, device=DEVICE)[:, None]
    x[1, width // 2], x[4, 0], x[6, -1] = math.nan, math.inf, -math.inf
    x[7] = 0.0
    x[8] = torch.randint(-7, 8, (width,), device=DEVICE) * 0.5  # halfway cases
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 128, 300, 513])
@pytest.mark.parametrize("scheme", ["int8", "row", "group", "static"])
def test_activations_are_rounded_as_defined(scheme, width, dtype):
    x = special_rows(width).to(dtype)
    static = torch.tensor([0.013], device=DEVICE) if scheme == "static" else None
    layout = Layout(x, x, None, None, 1, 1, 1, 128, scheme == "group")
    kind = "int8" if scheme == "int8" else "fp8"
    found, single = launches.operand(x, layout, static, kind, kind), x.float()
    if static is not None:
        scales = torch.where(single.isnan().any(-1, keepdim=True), math.nan, static)
        codes = (single / static).clamp(-448, 448).masked_fill(scales.isnan(), 0.0).to(torch.float8_e4m3fn)
    elif scheme == "int8":
        codes, scales = reference.quantize_int8(single)
    else:
        codes, scales, _ = reference.quantize_fp8(single, scheme, False)
    scales, codes = scales.t(), codes if scheme == "int8" else codes.view(torch.uint8)
    assert torch.equal(found.scales.nan_to_num(-1.0), scales.nan_to_num(-1.0))
    assert torch.equal(found.values, codes)


@given(
    weight=weights(),
    rows=st.integers(0, 9),
    dtype=dtypes,
    layout=strategies.layouts,
)
@settings(max_examples=20, deadline=None)
def test_the_gradient_of_the_input(weight, rows, dtype, layout):
    grad = tensor((rows, weight.shape[0]), dtype, layout)
    kind, tensors, group = operands(weight)
    (out,) = poisoned(grad.new_empty(rows, weight.shape[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "_DEQUANTIZED_BYTES", 0)  # 128 features at once
        got = gemm.quantized_linear_bwd(grad, *tensors[:4], kind, weight.shape[1], group, out=out)
    assert got is out
    exact, wide = grad.double() @ weight.dequantize(torch.float64), weight.dequantize(torch.float32)
    terms = torch.maximum(exact.abs(), (grad.double().square() @ weight.dequantize(torch.float64).square()).sqrt())
    assert_accurate("grad_input", got, (grad.float() @ wide).to(dtype), exact, terms)


def test_act_order_is_sorted_once_and_again_when_it_changes():
    weight = Int4Weight.quantize(torch.randn(9, 200, device=DEVICE), group_size=32)
    shuffled = (torch.arange(200) // 32)[torch.randperm(200)].int().to(DEVICE)
    groups = torch.where(torch.arange(200, device=DEVICE) < 90, 1, shuffled.long()).int()  # not of one size
    for g_idx in (shuffled, groups):
        given_tensors = (weight.packed, weight.scales, None, g_idx, "int4", 200, 32)
        first, second = layout_of(*given_tensors), layout_of(*given_tensors)
        assert first.codes is second.codes
        assert first.group == (32 if g_idx is shuffled else 128)
        made = Int4Weight.from_codes(weight.codes(), weight.scales, group_size=32, g_idx=g_idx)
        for activation in ACTIVATIONS[Int4Weight]:
            x = torch.randn(5, 200, device=DEVICE)
            judge(x, made, None, None, activation, "none", by_kernels(x, made, None, None, activation, "none"))
    weight.packed[3] ^= 0x11
    assert layout_of(*given_tensors).codes is not second.codes


@pytest.mark.parametrize("activation", ACTIVATIONS[Int4Weight])
def test_a_row_keeps_its_bits_among_others(activation):
    """Of one size of tiles, however many rows: K is split by the weight alone."""
    weight = Int4Weight.quantize(torch.randn(18, 130, device=DEVICE), group_size=64)
    for rows in (16, 64, 80):
        x = torch.randn(rows, 130, device=DEVICE)
        whole = by_kernels(x, weight, None, None, activation, "none")
        fewer = {16: 3, 64: 17, 80: 65}[rows]
        part = by_kernels(x[rows - fewer :].contiguous(), weight, None, None, activation, "none")
        assert torch.equal(part, whole[rows - fewer :])


def test_sums_of_integers_are_exact():
    """Of odd products, past what float32 counts."""
    weight = Int8Weight(torch.full((3, 2304), 127, dtype=torch.int8), torch.ones(3, 1)).to(DEVICE)
    weight.codes[1] = -127
    found = by_kernels(torch.full((2, 2304), 127.0, device=DEVICE), weight, None, None, "int8", "none")
    total = 127.0 * 127 * 2304
    assert total > 2**25
    assert found.tolist() == [[total, -total, total]] * 2


def test_a_row_that_is_not_finite_is_nan_and_alone():
    weight = Int4Weight.quantize(torch.randn(18, 70, device=DEVICE), group_size=32)
    x = torch.randn(6, 70, device=DEVICE)
    plain = {a: by_kernels(x, weight, None, None, a, "none") for a in ACTIVATIONS[Int4Weight]}
    x[2, 5], x[4, 69] = math.nan, math.inf
    for activation, expected in plain.items():
        found = by_kernels(x, weight, None, None, activation, "none")
        assert not found[[2, 4]].isfinite().any()
        kept = [0, 1, 3, 5]
        assert torch.equal(found[kept], expected[kept])


def test_no_rows_make_nothing():
    weight = Int8Weight.quantize(torch.randn(8, 40, device=DEVICE))
    x = torch.empty(0, 40, device=DEVICE)
    assert by_kernels(x, weight, None, None, "int8", "none").shape == (0, 8)


def test_a_group_that_no_tile_divides_is_an_error():
    """Configurations are data: one that would give wrong sums is refused."""
    weight = Int4Weight.quantize(torch.randn(8, 64, device=DEVICE), group_size=32)
    wide = row("quantized_linear_int4_few", None, BLOCK_N=16, BLOCK_M=4, BLOCK_K=64, GROUP=2)
    with configs.override(wide), pytest.raises(ValueError, match="BLOCK_K to divide the group"):
        by_kernels(torch.randn(2, 64, device=DEVICE), weight, None, None, "bf16", "none")

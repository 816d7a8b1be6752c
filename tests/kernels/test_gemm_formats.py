"""Every format: round trips to the bit, conversions that lose nothing, refusals that say why, hostile files."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m4ov_kernels.gemm.weights import FORMATS, Fp8Weight, Int4Weight, Int8Weight, detect, read, write
from m4ov_kernels.gemm.weights.bits import same

from .quantized import PREFIX, SCALES, fp8_weights, int4_weights, int8_weights, weights

EIGHTS = st.integers(1, 6).map(lambda n: 8 * n)
NEVER, ALWAYS = st.just(False), st.just(True)
HALVES = (torch.bfloat16, torch.float16)
WHOLE = {"groups": (32,), "columns": st.integers(1, 6).map(lambda n: 32 * n)}

# What each format can express: such a weight comes back as it was, to the bit.
EXPRESSIBLE = {
    "awq": st.one_of(
        int4_weights(rows=EIGHTS, **WHOLE, dtypes=HALVES, zeros=ALWAYS, act_order=NEVER, pre_quant=NEVER),
        int4_weights(rows=EIGHTS, groups=(-1,), dtypes=HALVES, zeros=ALWAYS, act_order=NEVER, pre_quant=NEVER),
    ),
    "gptq": int4_weights(rows=EIGHTS, columns=EIGHTS, dtypes=HALVES, lowest_zero=1, pre_quant=NEVER),
    "gptq_v2": int4_weights(rows=EIGHTS, columns=EIGHTS, dtypes=HALVES, pre_quant=NEVER),
    "compressed-tensors-int4": st.one_of(
        int4_weights(**WHOLE, pre_quant=NEVER), int4_weights(groups=(-1,), pre_quant=NEVER)
    ),
    "compressed-tensors-int8": int8_weights(),
    "compressed-tensors-fp8": fp8_weights(),
    "modelopt-fp8": fp8_weights(("tensor",), (torch.float32,), static=ALWAYS),
    "modelopt-fp8-pb-wo": fp8_weights(("block",), (torch.float32,), static=NEVER),
    "modelopt-w4a16-awq": int4_weights(
        rows=st.integers(1, 20).map(lambda n: 2 * n), **WHOLE, dtypes=(torch.float32,), zeros=NEVER, act_order=NEVER
    ),
    "block-fp8": fp8_weights(("block",), SCALES, static=NEVER),
}
expressed = st.sampled_from(sorted(FORMATS)).flatmap(lambda name: st.tuples(st.just(name), EXPRESSIBLE[name]))


def test_every_format_is_tested():
    assert set(EXPRESSIBLE) == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_comes_back_to_the_bit(name):
    @given(EXPRESSIBLE[name], st.sampled_from((PREFIX, "", "lm_head")))
    @settings(max_examples=25)
    def check(w, prefix):
        tensors, config = write(w, name, prefix)
        others = {f"{prefix}.bias" if prefix else "bias": torch.ones(w.shape[0]), "norm.weight": torch.ones(3)}
        assert detect({**tensors, **others}, config, prefix) == name
        found = read({**tensors, **others}, config, prefix)
        assert found.equal(w)
        again, same_config = write(found, name, prefix)
        assert same_config == config
        assert tensors.keys() == again.keys()
        assert all(same(tensors[key], again[key]) for key in tensors)
        assert all(tensor.is_contiguous() for tensor in tensors.values())

    check()


def expressible(w, name):
    """What each format can express, said a second time."""
    N, K = w.shape
    if isinstance(w, Int8Weight):
        return name == "compressed-tensors-int8"
    if isinstance(w, Fp8Weight):
        static = w.input_scale is not None
        return (
            name == "compressed-tensors-fp8"
            or (name == "modelopt-fp8" and w.granularity == "tensor" and static)
            or (name in ("modelopt-fp8-pb-wo", "block-fp8") and w.granularity == "block" and not static)
        )
    whole = w.group_size == -1 or K % w.group_size == 0
    z = w.with_zeros().zeros
    if name == "modelopt-w4a16-awq":
        return whole and w.group_size != -1 and N % 2 == 0 and w.g_idx is None and bool((z == 8).all())
    if w.pre_quant_scale is not None or "8" in name:
        return False
    if name == "compressed-tensors-int4":
        return whole
    halves = any(torch.equal(w.scales.to(dtype).float(), w.scales.float()) for dtype in HALVES)
    if name == "awq":
        return N % 8 == 0 and whole and w.g_idx is None and halves
    return N % 8 == 0 and K % 8 == 0 and halves and (name == "gptq_v2" or not bool((z == 0).any()))


@given(weights, st.sampled_from(sorted(FORMATS)))
@settings(max_examples=100)
def test_a_conversion_loses_nothing_or_says_why(w, name):
    if not expressible(w, name):
        with pytest.raises(ValueError, match=f"write to {name}: weight must be one that the format can express; got"):
            write(w, name, PREFIX)
        return
    tensors, config = write(w, name, PREFIX)
    found = read(tensors, config, PREFIX)
    assert type(found) is type(w)
    assert torch.equal(found.dequantize(torch.float64), w.dequantize(torch.float64))
    if isinstance(w, Int4Weight):
        assert same(found.pre_quant_scale, w.pre_quant_scale)
        assert torch.equal(found.codes(), w.codes())
    if isinstance(w, Fp8Weight):
        assert same(found.values, w.values)
        assert (found.input_scale is None) == (w.input_scale is None)


SYMMETRIC = int4_weights(rows=EIGHTS, **WHOLE, dtypes=HALVES, zeros=NEVER, act_order=NEVER, pre_quant=NEVER)


@given(SYMMETRIC, st.permutations(["awq", "gptq", "gptq_v2", "compressed-tensors-int4"]))
@settings(max_examples=40)
def test_through_all_int4_formats_and_back(w, names):
    """A chain of formats in any order: the weight at its end is the one at its beginning."""
    at = w
    for name in names:
        at = read(*write(at, name, PREFIX), PREFIX)
    assert at.without_zeros().equal(w)
    at = read(*write(at, "modelopt-w4a16-awq", PREFIX), PREFIX)
    assert at.equal(Int4Weight.from_codes(w.codes(), w.scales.float(), group_size=w.group_size))


def make(N=16, K=64, group_size=32, dtype=torch.float16, **rest):
    G = 1 if group_size == -1 else -(-K // group_size)
    codes = torch.arange(N * K).reshape(N, K).remainder(16).byte()
    return Int4Weight.from_codes(codes, torch.ones(N, G, dtype=dtype), group_size=group_size, **rest)


ORDER = torch.arange(64).remainder(2).int()
UNEVEN = (torch.arange(64) < 5).int()
FP8 = torch.ones(130, 3).to(torch.float8_e4m3fn)
TENSOR, BLOCKS = Fp8Weight(FP8, torch.ones(1, 1), "tensor"), Fp8Weight(FP8, torch.ones(2, 1), "block", torch.ones(1))
REFUSED = [
    ("awq", make(N=12), "12 isn't a multiple of 8"),
    ("awq", make(K=60), "60 isn't a multiple of 32"),
    ("awq", make(g_idx=ORDER), "act-order"),
    ("awq", make(pre_quant_scale=torch.ones(64)), "pre_quant_scale"),
    ("awq", make(dtype=torch.float32, pre_quant_scale=None).to("cpu"), None),
    ("gptq", make(zeros=torch.zeros(16, 2, dtype=torch.uint8)), "z − 1"),
    ("gptq_v2", make(K=60), "60 isn't a multiple of 8"),
    ("gptq_v2", make(N=12), "12 isn't a multiple of 8"),
    ("gptq_v2", make(pre_quant_scale=torch.ones(64)), "pre_quant_scale"),
    ("compressed-tensors-int4", make(K=60), "60 isn't a multiple of 32"),
    ("compressed-tensors-int4", make(g_idx=UNEVEN), "59, 5"),
    ("compressed-tensors-int4", make(pre_quant_scale=torch.ones(64)), "pre_quant_scale"),
    ("compressed-tensors-int8", make(), "eight-bit integers alone"),
    ("compressed-tensors-fp8", make(), "float8_e4m3fn alone"),
    ("modelopt-fp8", TENSOR, "no input_scale"),
    ("modelopt-fp8", BLOCKS, "one scale for the tensor"),
    ("modelopt-fp8-pb-wo", BLOCKS, "weight-only"),
    ("modelopt-fp8-pb-wo", TENSOR, "128×128 block"),
    ("modelopt-w4a16-awq", make(N=15), "15 is odd"),
    ("modelopt-w4a16-awq", make(zeros=torch.full((16, 2), 7, dtype=torch.uint8)), "zero points other than 8"),
    ("modelopt-w4a16-awq", make(group_size=-1), "whole groups"),
    ("modelopt-w4a16-awq", make(g_idx=ORDER), "act-order"),
    ("block-fp8", BLOCKS, "activations are dynamic"),
    ("block-fp8", TENSOR, "128×128 block"),
    ("block-fp8", Int8Weight(torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 1)), "float8_e4m3fn alone"),
]


@pytest.mark.parametrize(("name", "w", "why"), REFUSED, ids=[f"{name}-{why}" for name, _, why in REFUSED])
def test_a_target_that_cannot_says_why(name, w, why):
    if why is None:
        write(w, name)  # float32 scales that float16 holds exactly
        return
    with pytest.raises(ValueError, match=f"write to {name}: .*{why}"):
        write(w, name)


def test_scales_that_16_bits_cannot_hold_are_not_rounded():
    w = make(dtype=torch.float32)
    w.scales.fill_(1 / 3)
    for name in ("awq", "gptq", "gptq_v2"):
        with pytest.raises(ValueError, match="exact neither in float16 nor in bfloat16"):
            write(w, name)
    w.scales.fill_(2.0**100)  # exact in bfloat16 alone
    assert write(w, "awq")[0]["scales"].dtype is torch.bfloat16


SEVENS = torch.full((16, 2), 7, dtype=torch.uint8)
SAMPLES = {
    "awq": make(zeros=SEVENS),
    "gptq": make(zeros=SEVENS, g_idx=ORDER),
    "gptq_v2": make(zeros=SEVENS, g_idx=ORDER),
    "compressed-tensors-int4": make(zeros=SEVENS, g_idx=ORDER),
    "compressed-tensors-int8": Int8Weight(torch.ones(6, 5, dtype=torch.int8), torch.ones(6, 1)),
    "compressed-tensors-fp8": Fp8Weight(FP8, torch.ones(2, 1), "block"),
    "modelopt-fp8": Fp8Weight(FP8, torch.ones(1, 1), "tensor", torch.ones(1)),
    "modelopt-fp8-pb-wo": Fp8Weight(FP8, torch.ones(2, 1), "block"),
    "modelopt-w4a16-awq": make(dtype=torch.float32, pre_quant_scale=torch.ones(64)),
    "block-fp8": Fp8Weight(FP8, torch.ones(2, 1), "block"),
}

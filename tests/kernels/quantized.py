"""Random quantised weights of every kind, drawn by hypothesis or by a ``Draw``: any N and K, groups, zero points,
act-order, scales."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight

from .draws import Draw

PREFIX = "model.layers.0.mlp.down_proj"
SCALES = (torch.float32, torch.bfloat16, torch.float16)
GROUPS = (32, 64, 128, -1)
ROWS, COLUMNS, EITHER = st.integers(1, 40), st.integers(1, 300), st.booleans()


def scales(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Scales from the smallest subnormal to the largest number of dtype, and the usual ones."""
    usual = (torch.rand(shape, generator=generator) * 0.1 + 1e-3).to(dtype)
    ends = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny, torch.finfo(dtype).tiny / 4, 1.0]).to(dtype)
    which = torch.randint(0, 16, shape, generator=generator)
    return torch.where(which < 4, ends[which.clamp(max=3)], usual)


@st.composite
def generators(draw: st.DrawFn) -> torch.Generator:
    return torch.Generator().manual_seed(draw(st.integers(0, 2**31)))


@st.composite
def int4_weights(
    draw: st.DrawFn,
    rows: st.SearchStrategy[int] = ROWS,
    columns: st.SearchStrategy[int] = COLUMNS,
    groups: tuple[int, ...] = GROUPS,
    dtypes: tuple[torch.dtype, ...] = SCALES,
    zeros: st.SearchStrategy[bool] = EITHER,
    lowest_zero: int = 0,
    act_order: st.SearchStrategy[bool] = EITHER,
    pre_quant: st.SearchStrategy[bool] = EITHER,
) -> Int4Weight:
    N, K, size, generator = draw(rows), draw(columns), draw(st.sampled_from(groups)), draw(generators())
    G = 1 if size == -1 else -(-K // size)
    g_idx = None
    if draw(act_order):  # as act-order makes it: a permutation of the natural groups
        g_idx = (torch.arange(K) // (K if size == -1 else size))[torch.randperm(K, generator=generator)].int()
    return Int4Weight.from_codes(
        torch.randint(0, 16, (N, K), generator=generator, dtype=torch.uint8),
        scales((N, G), draw(st.sampled_from(dtypes)), generator),
        group_size=size,
        zeros=torch.randint(lowest_zero, 16, (N, G), generator=generator).byte() if draw(zeros) else None,
        g_idx=g_idx,
        pre_quant_scale=scales((K,), torch.bfloat16, generator) if draw(pre_quant) else None,
    )


@st.composite
def int8_weights(draw: st.DrawFn) -> Int8Weight:
    N, K, generator = draw(st.integers(1, 40)), draw(st.integers(1, 300)), draw(generators())
    codes = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
    return Int8Weight(codes, scales((N, 1), draw(st.sampled_from(SCALES)), generator))


@st.composite
def fp8_weights(
    draw: st.DrawFn,
    granularities: tuple[str, ...] = ("tensor", "channel", "block"),
    dtypes: tuple[torch.dtype, ...] = SCALES,
    static: st.SearchStrategy[bool] = EITHER,
) -> Fp8Weight:
    N, K, generator = draw(st.integers(1, 270)), draw(st.integers(1, 270)), draw(generators())
    granularity, dtype = draw(st.sampled_from(granularities)), draw(st.sampled_from(dtypes))
    shape = {"tensor": (1, 1), "channel": (N, 1), "block": (-(-N // 128), -(-K // 128))}[granularity]
    codes = torch.randint(0, 256, (N, K), generator=generator).byte()
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    input_scale = scales((1,), torch.float32, generator) if draw(static) else None
    return Fp8Weight(codes.view(torch.float8_e4m3fn), scales(shape, dtype, generator), granularity, input_scale)


weights = st.one_of(int4_weights(), int8_weights(), fp8_weights())


def drawn_weight(kind: str, N: int, K: int, draw: Draw) -> Int4Weight | Int8Weight | Fp8Weight:
    """Of one shape: half with usual scales, half with those at the ends of their dtype; some with a row of zeros."""
    generator = torch.Generator().manual_seed(draw.integer(0, 2**31))
    dtype, ends = draw.choice(SCALES), draw.one_in(2)

    def made(*shape: int) -> torch.Tensor:
        usual = (torch.rand(shape, generator=generator) * 0.1 + 1e-3).to(dtype)
        return scales(shape, dtype, generator) if ends else usual

    if kind == "int8":
        codes = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
        if draw.one_in(8):
            codes[draw.integer(0, N - 1)] = 0
        return Int8Weight(codes, made(N, 1))
    if kind == "fp8":
        granularity = draw.choice(("channel", "block", "tensor"))
        shape = {"tensor": (1, 1), "channel": (N, 1), "block": (-(-N // 128), -(-K // 128))}[granularity]
        codes = torch.randint(0, 256, (N, K), generator=generator).byte()
        codes[(codes & 0x7F) == 0x7F] = 0  # NaN
        static = torch.rand(1, generator=generator) * 0.01 + 1e-4 if draw.one_in(3) else None
        return Fp8Weight(codes.view(torch.float8_e4m3fn), made(*shape), granularity, static)
    size = draw.choice((128, 32, 64, -1))
    G = 1 if size == -1 else -(-K // size)
    zeros = torch.randint(0, 16, (N, G), generator=generator).byte() if draw.boolean() else None
    g_idx = None
    if draw.one_in(4):  # a permutation of the natural groups, or any groups at all, some without a feature
        natural = (torch.arange(K) // (K if size == -1 else size))[torch.randperm(K, generator=generator)]
        g_idx = natural.int() if draw.boolean() else torch.randint(0, G, (K,), generator=generator).int()
    codes = torch.randint(0, 16, (N, K), generator=generator, dtype=torch.uint8)
    if draw.one_in(8):
        row = draw.integer(0, N - 1)
        groups = torch.arange(K) // (K if size == -1 else size) if g_idx is None else g_idx.long()
        codes[row] = 8 if zeros is None else zeros[row, groups]
    factor = scales((K,), torch.bfloat16, generator) if draw.one_in(6) else None
    rest = {"zeros": zeros, "g_idx": g_idx, "pre_quant_scale": factor}
    return Int4Weight.from_codes(codes, made(N, G), group_size=size, **rest)

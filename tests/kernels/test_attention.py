"""varlen_attention: native kernels on every ISA against float64; the contract's other points."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import m4ov_kernels
from m4ov_kernels import varlen_attention
from m4ov_kernels.attention import native, reference
from m4ov_kernels.bounds import check_bounds

from . import strategies
from .numerics import assert_accurate, gradients, leaves, poisoned
from .operators.attention import sums_of_absolutes

NAMES = ("output", "grad_q", "grad_k", "grad_v")
# Around the blocks of 64 lanes and 128 keys, and past 512 keys, where the backward's gradients of queries are shared.
lengths = st.lists(st.integers(0, 20) | st.sampled_from([1, 32, 64, 65, 129, 200, 540]), min_size=1, max_size=3)
heads = st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 2), (3, 3), (5, 1)])
dims = st.sampled_from([1, 2, 7, 16, 32, 33, 64, 72, 80, 96, 128, 130])


def bounds(sizes: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(dtype)


def per_sequence(q: Tensor, k: Tensor, v: Tensor, sizes: list[int], sizes_k: list[int], causal: bool) -> Tensor:
    """PyTorch's own attention, sequence by sequence."""
    outputs = []
    for rows, keys, values in zip(q.split(sizes), k.split(sizes_k), v.split(sizes_k), strict=True):
        group = q.shape[1] // k.shape[1]
        query, key, value = (x.transpose(0, 1) for x in (rows, keys, values))
        key, value = (x.repeat_interleave(group, dim=0) for x in (key, value))
        visible = torch.ones(len(rows), len(keys), dtype=torch.bool)
        visible = visible.tril(len(keys) - len(rows)) if causal else visible
        if causal and len(keys) == len(rows):
            output = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0]
        else:
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        output = output.masked_fill(~visible.any(1)[:, None], 0.0)
        outputs.append(output.transpose(0, 1))
    return torch.cat([q[:0], *outputs])


def spelled_out(q: Tensor, k: Tensor, v: Tensor, sizes: list[int], sizes_k: list[int], causal: bool) -> Tensor:
    """The same, as Hugging Face's eager attention computes it."""
    outputs = []
    for rows, keys, values in zip(q.split(sizes), k.split(sizes_k), v.split(sizes_k), strict=True):
        group = q.shape[1] // k.shape[1]
        query, key, value = (x.transpose(0, 1) for x in (rows, keys, values))
        key, value = (x.repeat_interleave(group, dim=0) for x in (key, value))
        hidden = torch.ones(len(rows), len(keys), dtype=torch.bool).tril(len(keys) - len(rows)).logical_not() & causal
        empty = hidden.all(1, keepdim=True)
        scores = (query @ key.mT * q.shape[2] ** -0.5).masked_fill(hidden, -torch.inf).masked_fill(empty, 0.0)
        p = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        outputs.append((p.masked_fill(empty, 0.0) @ value).transpose(0, 1))
    return torch.cat([q[:0], *outputs])


def terms(*arguments: Any) -> list[Tensor]:
    return sums_of_absolutes(*arguments, arguments[0].shape[2] ** -0.5)


def run(function, dtype: torch.dtype, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    inputs = leaves(dtype, *tensors)
    output = function(*inputs)
    return [output, *gradients(output, inputs, [grad.to(dtype)])]


def assert_close_to_exact(function, tensors, grad, sizes, sizes_k, causal):
    dtype = tensors[0].dtype
    ours = run(function, dtype, tensors, grad)
    exact = run(lambda *t: spelled_out(*t, sizes, sizes_k, causal), torch.float64, tensors, grad)
    plain = [
        run(lambda *t, f=f: f(*t, sizes, sizes_k, causal), dtype, tensors, grad) for f in (per_sequence, spelled_out)
    ]
    for name, a, b, c, e, size in zip(
        NAMES, ours, *plain, exact, terms(*tensors, grad, sizes, sizes_k, causal), strict=True
    ):
        # The largest error of few numbers is mostly chance: the yardstick is the worse of PyTorch's two ways.
        worse = max(b, c, key=lambda x, e=e: float((x - e).detach().nan_to_num(0.0).abs().amax() if x.numel() else 0))
        assert_accurate(name, a, worse, e, terms=size)


@given(
    sizes=lengths,
    heads=heads,
    dim=dims,
    dtype=strategies.dtypes,
    layout=strategies.layouts,
    magnitude=st.sampled_from((1.0, 1.0, 1e-4, 8.0)),
    causal=st.booleans(),
)
@settings(max_examples=25)
def test_native_forward_and_gradients(isa, sizes, heads, dim, dtype, layout, magnitude, causal):
    total = sum(sizes)
    tensors = [strategies.tensor((total, many, dim), dtype, layout, magnitude) for many in (heads[0], *heads[1:] * 2)]
    grad = strategies.tensor((total, heads[0], dim), dtype, layout)
    with m4ov_kernels.backend("native"):
        assert_close_to_exact(
            lambda *t: varlen_attention(*t, bounds(sizes), causal=causal), tensors, grad, sizes, sizes, causal
        )


@given(
    sizes=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 300)), min_size=1, max_size=4),
    heads=heads,
    dim=st.sampled_from([8, 33, 64]),
    dtype=strategies.dtypes,
    causal=st.booleans(),
)
@settings(max_examples=15)
def test_keys_of_other_lengths_than_queries(isa, sizes, heads, dim, dtype, causal):
    rows, keys = [size[0] for size in sizes], [size[1] for size in sizes]
    q, grad = (strategies.tensor((sum(rows), heads[0], dim), dtype) for _ in range(2))
    k, v = (strategies.tensor((sum(keys), heads[1], dim), dtype) for _ in range(2))
    arguments = {"cu_seqlens_k": bounds(keys, torch.int64), "causal": causal}
    with m4ov_kernels.backend("native"):
        assert_close_to_exact(
            lambda *t: varlen_attention(*t, bounds(rows), **arguments), [q, k, v], grad, rows, keys, causal
        )


def test_large_scores_of_wide_heads_are_summed_as_well_as_pytorchs(isa):
    """fp32 and scores of about 12: an error in a score is one in the exponent. (Found by the fuzzer.)"""
    q, grad = (torch.randn(200, 3, 128) for _ in range(2))
    k, v = (torch.randn(200, 3, 128) for _ in range(2))
    with m4ov_kernels.backend("native"):
        assert_close_to_exact(
            lambda *t: varlen_attention(*t, bounds([200]), causal=True),
            [q * 128**0.5, k, v],
            grad,
            [200],
            [200],
            True,
        )


@pytest.mark.parametrize("dtype", strategies.HALF_AND_SINGLE)
@pytest.mark.parametrize("sizes", [[0], [1], [5, 0, 70], [130, 3], [700]])
def test_every_element_of_preallocated_outputs_is_written(isa, sizes, dtype):
    q, grad = (strategies.tensor((sum(sizes), 4, 20), dtype) for _ in range(2))
    k, v = (strategies.tensor((sum(sizes), 2, 20), dtype) for _ in range(2))
    options = (bounds(sizes), None, 9, 9, True, 0.3)
    out = poisoned(q, torch.empty(2, 4, sum(sizes)))
    result, normalizer = native.varlen_attention_fwd(q, k, v, *options, out=out)
    assert result is out[0]
    assert normalizer is out[1]
    grads = poisoned(q, k, v)
    native.varlen_attention_bwd(grad, q, k, v, result, normalizer, *options, out=grads)
    assert not any(tensor.isnan().any() for tensor in (*out, *grads))


@pytest.mark.parametrize("dtype", strategies.HALF_AND_SINGLE)
@pytest.mark.parametrize("causal", [True, False])
def test_bits_do_not_depend_on_the_number_of_threads(isa, dtype, causal):
    sizes = [900, 3, 130, 64, 7]
    q, grad = (strategies.tensor((sum(sizes), 6, 64), dtype) for _ in range(2))
    k, v = (strategies.tensor((sum(sizes), 2, 64), dtype) for _ in range(2))
    options = (bounds(sizes), None, 9, 9, causal, 0.125)

    def results(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        result, normalizer = native.varlen_attention_fwd(q, k, v, *options)
        return [result, normalizer, *native.varlen_attention_bwd(grad, q, k, v, result, normalizer, *options)]

    before = torch.get_num_threads()
    try:
        first, *others = (results(threads) for threads in (1, 2, 3, 7))
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", strategies.HALF_AND_SINGLE)
@pytest.mark.parametrize(("heads", "dim"), [((4, 2), 64), ((3, 3), 72), ((5, 1), 33)])
def test_decoding_a_row_gives_the_bits_of_prefilling_it(isa, dtype, heads, dim):
    """Alone, a few at once, or beside other sequences: the same bits, wherever the row stands in its blocks."""
    length = 300
    q = strategies.tensor((length, heads[0], dim), dtype)
    k, v = (strategies.tensor((length, heads[1], dim), dtype) for _ in range(2))
    whole = varlen_attention(q, k, v, bounds([length]), causal=True, invariant=True)
    for begin, end in ((0, 1), (1, 2), (63, 64), (127, 128), (128, 129), (200, 207), (298, 299), (299, 300)):
        some = varlen_attention(
            q[begin:end],
            k[:end],
            v[:end],
            bounds([end - begin]),
            cu_seqlens_k=bounds([end]),
            causal=True,
            invariant=True,
        )
        assert torch.equal(some, whole[begin:end]), (begin, end)
    others = [strategies.tensor((77, many, dim), dtype) for many in (heads[0], *heads[1:] * 2)]
    packed = [torch.cat([a, b, a]) for a, b in zip(others, (q, k, v), strict=True)]
    together = varlen_attention(*packed, bounds([77, length, 77]), causal=True, invariant=True)
    assert torch.equal(together[77 : 77 + length], whole)


@pytest.mark.parametrize("dtype", strategies.DTYPES)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (8, 1)]),
    dim=st.sampled_from([2, 7, 32, 33, 64, 128]),
    prompts=st.lists(st.integers(1, 20) | st.sampled_from([127, 128, 129, 255, 300]), min_size=1, max_size=3),
    own=st.lists(st.integers(1, 5) | st.sampled_from([1, 2, 127, 128, 129, 260]), min_size=1, max_size=6),
    data=st.data(),
)
@settings(max_examples=8)
def test_a_shared_prefix_gives_the_bits_of_keys_in_one_run(isa, dtype, heads, dim, prompts, own, data):
    """Prompts that samples share, anywhere among the keys, and runs of their own with gaps between: keys that nobody
    asks for are NaN."""
    gap = 3
    starts, end = [], gap
    for size in own:
        starts.append(end)
        end += size + gap
    firsts = []
    for size in reversed(prompts):
        firsts.insert(0, end)
        end += size
    k, v = (torch.full((end, heads[1], dim), float("nan"), dtype=dtype) for _ in range(2))
    for first, size in [*zip(starts, own, strict=True), *zip(firsts, prompts, strict=True)]:
        k[first : first + size], v[first : first + size] = torch.randn(2, size, heads[1], dim)
    q = torch.randn(len(own), heads[0], dim).to(dtype)
    asked = sorted(data.draw(st.integers(0, len(prompts) - 1)) for _ in own)  # neighbours share, as in the engine
    if data.draw(st.booleans()):
        asked = asked[::2] + asked[1::2]
    places = torch.tensor([[firsts[place] for place in asked], [prompts[place] for place in asked], starts, own])
    found = native.decode_attention(q, k, v, places, scale=0.3)
    rows = [
        torch.cat([torch.arange(firsts[place], firsts[place] + prompts[place]), torch.arange(start, start + size)])
        for place, start, size in zip(asked, starts, own, strict=True)
    ]
    together = torch.cat(rows)
    sizes = bounds([len(row) for row in rows])
    expected = varlen_attention(
        q, k[together], v[together], bounds([1] * len(own)), cu_seqlens_k=sizes, causal=True, scale=0.3
    )
    assert expected.isfinite().all()
    assert torch.equal(found, expected)
    places[1] = 0
    without = native.decode_attention(q, k, v, places, scale=0.3)
    alone = torch.cat([torch.arange(start, start + size) for start, size in zip(starts, own, strict=True)])
    expected = varlen_attention(
        q, k[alone], v[alone], bounds([1] * len(own)), cu_seqlens_k=bounds(own), causal=True, scale=0.3
    )
    assert torch.equal(without, expected)


@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_more_samples_of_a_prompt_than_a_block_holds(isa, dtype):
    """In fewer blocks, on any number of threads: the bits of each by itself."""
    for heads, kv_heads in ((6, 2), (8, 1), (2, 2)):
        count, prompt = 70, 131
        own = [1 + place % 7 for place in range(count)]
        starts = [prompt + 8 * place for place in range(count)]
        k, v = (torch.randn(prompt + 8 * count, kv_heads, 32).to(dtype) for _ in range(2))
        q = torch.randn(count, heads, 32).to(dtype)
        places = torch.tensor([[0] * count, [prompt] * count, starts, own])
        whole = native.decode_attention(q, k, v, places, scale=0.2)
        single = [
            native.decode_attention(q[i : i + 1], k, v, places[:, i : i + 1].contiguous(), scale=0.2)
            for i in range(count)
        ]
        assert torch.equal(whole, torch.cat(single))
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
        again = native.decode_attention(q, k, v, places, scale=0.2)
        torch.set_num_threads(threads)
        assert torch.equal(whole, again)


def test_invariance_is_refused_where_it_is_not_kept():
    q = torch.randn(3, 1, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="invariant=True is kept by the compiled CPU kernels only; here reference"):
        varlen_attention(q, q, q, bounds([3]), causal=True, invariant=True)


@pytest.mark.parametrize("dtype", strategies.HALF_AND_SINGLE)
def test_extreme_values(isa, dtype):
    """NaN and infinities come out where PyTorch has them; scores near overflow give what float64 gives."""
    sizes = [40, 5]
    for value in (torch.nan, torch.inf, -torch.inf):
        for which in range(3):
            tensors = [strategies.tensor((45, 2, 16), dtype) for _ in range(3)]
            tensors[which][20, 0, 3] = value
            got = varlen_attention(*tensors, bounds(sizes), causal=False)
            expected = spelled_out(*(t.float() for t in tensors), sizes, sizes, False)
            assert torch.equal(got.isnan(), expected.isnan())
            assert not got[40:].isnan().any(), "another sequence is touched"
            assert not got[:, 1].isnan().any(), "another head is touched"
    large = {torch.float16: 100.0, torch.bfloat16: 1e18, torch.float32: 1e18}[dtype]
    q, k = (torch.randn(45, 2, 16).sign().to(dtype) * large for _ in range(2))
    v = strategies.tensor((45, 2, 16), dtype)
    got = varlen_attention(q, k, v, bounds(sizes), causal=True)
    plain = spelled_out(q.float(), k.float(), v.float(), sizes, sizes, True).to(dtype)
    exact = spelled_out(q.double(), k.double(), v.double(), sizes, sizes, True)
    assert_accurate("output", got, plain, exact)


def test_gradcheck_of_the_reference():
    q = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(5, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for causal in (True, False):

        def function(*tensors, causal=causal):
            return varlen_attention(*tensors, bounds([2, 0, 2]), cu_seqlens_k=bounds([1, 1, 3]), causal=causal)

        with m4ov_kernels.backend("reference"):
            assert torch.autograd.gradcheck(function, (q, k, v))
            assert torch.autograd.gradgradcheck(function, (q, k, v))


@given(sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5), causal=st.booleans())
@settings(max_examples=40)
def test_the_reference_is_one_mask_over_all_pairs(sizes, causal):
    """What torch.compile gets, which does not know the lengths, is what the loop over sequences gives."""
    rows, keys = [size[0] for size in sizes], [size[1] for size in sizes]
    q = torch.randn(sum(rows), 4, 5, dtype=torch.float64)
    k, v = torch.randn(2, sum(keys), 2, 5, dtype=torch.float64)
    looped = reference.varlen_attention(q, k, v, bounds(rows), bounds(keys), causal, 0.4)
    torch.testing.assert_close(reference._masked(q, k, v, bounds(rows), bounds(keys), causal, 0.4), looped)
    visible = torch.zeros(sum(rows), sum(keys), dtype=torch.bool)
    for (a, b), (c, d) in zip(pairwise(bounds(rows).tolist()), pairwise(bounds(keys).tolist()), strict=True):
        visible[a:b, c:d] = torch.ones(b - a, d - c).tril(d - c - b + a if causal else d - c).bool()
    query, key, value = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    key, value = (x.repeat_interleave(2, dim=0) for x in (key, value))
    masked = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=0.4)
    torch.testing.assert_close(looped, masked.nan_to_num(0.0).transpose(0, 1))


def test_native_refuses_wrong_values_itself():
    """The registered operator, which torch.compile calls, has no front door before it."""
    q = torch.randn(6, 2, 8)
    for cu_seqlens in ([0, 7], [0, 4, 3, 6], [1, 6]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            torch.ops.m4ov.varlen_attention_fwd(q, q, q, torch.tensor(cu_seqlens), None, 6, 6, True, 1.0)


def test_bounds_are_read_as_they_are():
    assert check_bounds("varlen_attention", "cu_seqlens", torch.tensor([0, 2, 2, 5], dtype=torch.int32), 5) == [
        0,
        2,
        2,
        5,
    ]


GOOD = {"q": torch.ones(6, 4, 8), "k": torch.ones(6, 2, 8), "v": torch.ones(6, 2, 8), "cu_seqlens": bounds([2, 4])}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(6, 4, 8).long()}, TypeError, "q must be a bfloat16.*int64 tensor"),
        (
            {"q": torch.ones(6, 8)},
            ValueError,
            r"q must be \[T, H, D\] with H and D at least 1; got float32 tensor \[6, 8\]",
        ),
        ({"k": torch.ones(6, 2, 8).half()}, TypeError, "k must be torch.float32, as q; got torch.float16"),
        ({"k": torch.ones(6, 3, 8)}, ValueError, r"k must be \[S, KV, 8\] with KV dividing 4, the heads of q"),
        ({"v": torch.ones(6, 2, 9)}, ValueError, r"v must be \[S, KV, 8\]"),
        ({"v": torch.ones(6, 1, 8)}, ValueError, r"v must be \[6, 2, 8\], as k; got \[6, 1, 8\]"),
        ({"v": None}, TypeError, "v must be a tensor; got NoneType"),
        ({"k": torch.ones(6, 2, 8, device="meta")}, ValueError, "k must be on cpu, as q; got one on meta"),
        ({"k": torch.ones(7, 2, 8), "v": torch.ones(7, 2, 8)}, ValueError, "k must be of 6 tokens, as q, unless"),
        ({"cu_seqlens": [0, 6]}, TypeError, r"cu_seqlens must be an int32 or int64 tensor; got list \[0, 6\]"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens must be an int32 or int64 tensor"),
        ({"cu_seqlens": torch.tensor([[0, 6]])}, ValueError, r"cu_seqlens must be \[N \+ 1\]"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, ValueError, r"cu_seqlens must be \[N \+ 1\]"),
        ({"cu_seqlens": torch.tensor([1, 6])}, ValueError, r"cu_seqlens\[0\] is 1: expected 0"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"cu_seqlens\[1\] is 5: expected 6, the number of tokens"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, ValueError, r"cu_seqlens\[2\] is 2: expected 4 or greater"),
        ({"cu_seqlens_k": torch.tensor([0, 6])}, ValueError, r"cu_seqlens_k must be \[3\], as cu_seqlens; got \[2\]"),
        ({"cu_seqlens_k": torch.tensor([0, 7, 6])}, ValueError, r"cu_seqlens_k\[2\] is 6: expected 7 or greater"),
        ({"max_seqlen": -1}, ValueError, "max_seqlen must be 0 or greater, or None; got -1"),
        ({"scale": 0.0}, ValueError, "scale must be a number greater than 0, or None; got 0.0"),
        ({"scale": float("nan")}, ValueError, "scale must be a number greater than 0"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_bad_arguments_are_named(change, error, message, backend):
    with m4ov_kernels.backend(backend), pytest.raises(error, match="varlen_attention: " + message):
        varlen_attention(**(GOOD | {"causal": True} | change))

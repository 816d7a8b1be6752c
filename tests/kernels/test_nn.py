"""The modules over the operators: packing, packed attention, loss, patch embedding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from m4ov_kernels import nn as ours
from m4ov_kernels.nn import PackedSequences, packed_attention
from tests.kernels.numerics import assert_accurate, gradients, leaves

lengths = st.lists(st.integers(0, 40) | st.sampled_from([1, 16, 64, 129, 200]), min_size=1, max_size=12)


def masked(query: Tensor, key: Tensor, value: Tensor, sizes: list[int], is_causal: bool) -> Tensor:
    """The definition: one mask over all pairs of tokens. ``[1, H, T, D]`` → ``[1, T, H, D]``."""
    mask = allowed_pairs(sizes, is_causal)
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def allowed_pairs(sizes: list[int], is_causal: bool) -> Tensor:
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    mask = owner[:, None] == owner
    return mask.tril() if is_causal else mask


@given(sizes=lengths, kv_heads=st.sampled_from([1, 2, 4]), is_causal=st.booleans(), dtype=st.sampled_from(["f", "b"]))
@settings(max_examples=40)
def test_packed_attention_is_masked_attention(sizes, kv_heads, is_causal, dtype):
    total, dtype = sum(sizes), {"f": torch.float32, "b": torch.bfloat16}[dtype]
    packing = PackedSequences.from_lengths(sizes)
    assert packing.tokens == total
    if not total:
        empty = torch.empty(1, 4, 0, 16)
        assert packed_attention(empty, empty, empty, packing, is_causal=is_causal).shape == (1, 0, 4, 16)
        return
    # Strided as a model has them: heads beside each other in memory.
    inputs = [torch.randn(1, total, heads, 16).transpose(1, 2) for heads in (4, kv_heads, kv_heads)]
    grad = torch.randn(1, total, 4, 16)
    results = []
    for of, function in (
        (dtype, lambda *qkv: packed_attention(*qkv, packing, is_causal=is_causal)),
        (dtype, lambda *qkv: masked(*qkv, sizes, is_causal)),
        (dtype, lambda *qkv: spelled_out(*qkv, sizes, is_causal)),
        (torch.float64, lambda *qkv: masked(*qkv, sizes, is_causal)),
    ):
        qkv = leaves(of, *(x.to(dtype) for x in inputs))
        output = function(*qkv)
        results.append([output, *gradients(output, qkv, [grad.to(dtype).to(of)])])
    names = ("output", "query", "key", "value")
    mine, *plain, exact = results
    for name, a, b, c, e, size in zip(names, mine, *plain, exact, terms(*inputs, grad, sizes, is_causal), strict=True):
        # The largest error of so few numbers is mostly chance: the yardstick is the worse of PyTorch's two ways.
        assert_accurate(name, a, max(b, c, key=lambda x, e=e: float((x - e).detach().abs().max())), e, terms=size)


def spelled_out(query: Tensor, key: Tensor, value: Tensor, sizes: list[int], is_causal: bool) -> Tensor:
    """The same, as Hugging Face's eager attention computes it."""
    repeats, scale = query.shape[1] // key.shape[1], query.shape[-1] ** -0.5
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = (query @ key.mT * scale).masked_fill(~allowed_pairs(sizes, is_causal), -torch.inf)
    return (
        torch.softmax(scores, -1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query) @ value
    ).transpose(1, 2)


def terms(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, sizes: list[int], is_causal: bool) -> list[Tensor]:
    """What output and gradients are sums and differences of: the same sums over absolute values."""
    q, k, v, g = (x.double() for x in (query, key, value, grad.transpose(1, 2)))
    repeats, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    mask = allowed_pairs(sizes, is_causal)
    p = (q @ k.mT * scale).masked_fill(~mask, -torch.inf).softmax(-1)
    a = g.abs() @ v.abs().mT
    a = p * (a + (p * a).sum(-1, keepdim=True)) * scale
    shared = [x.unflatten(1, (-1, repeats)).sum(2) for x in (a.mT @ q.abs(), p.mT @ g.abs())]
    return [(p @ v.abs()).transpose(1, 2), a @ k.abs(), *shared]


@given(sizes=lengths)
def test_packing_lays_every_token_out_once(sizes):
    packing = PackedSequences.from_lengths(sizes)
    tokens = torch.arange(sum(sizes), dtype=torch.float64)[:, None].requires_grad_()
    padded = packing.pad(tokens)
    assert padded.shape[0] == sum(group.count * group.length for group in packing.groups)
    assert torch.equal(packing.unpad(padded), tokens)
    if packing.valid is not None:
        assert int(packing.valid.sum()) == sum(sizes)
        assert padded.shape[0] - sum(sizes) <= max(256, sum(sizes) // 4) * len(packing.groups)
    if sum(sizes):
        (grad,) = torch.autograd.grad(packing.unpad(padded * 3).sum(), tokens)
        assert torch.equal(grad, torch.full_like(grad, 3))


@given(rows=st.integers(1, 3), sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6))
def test_packing_from_positions_and_bounds(rows, sizes):
    positions = torch.cat([torch.arange(size) for size in sizes]).expand(rows, -1)
    expected = PackedSequences.from_lengths(sizes * rows)
    bounds = torch.tensor([0, *sizes * rows]).cumsum(0, dtype=torch.int32)
    for made in (PackedSequences.from_position_ids(positions), PackedSequences.from_cu_seqlens(bounds)):
        assert made.groups == expected.groups
        assert (made.slots is None and expected.slots is None) or torch.equal(made.slots, expected.slots)
    assert PackedSequences.from_position_ids(torch.arange(5).expand(rows, -1) + 3) is None


def test_what_does_not_fit_is_refused():
    query = torch.randn(1, 4, 6, 8)
    with pytest.raises(ValueError, match="packing has 5 tokens; query has 1 x 6"):
        packed_attention(query, query, query, PackedSequences.from_lengths([5]), is_causal=True)
    with pytest.raises(ValueError, match=r"KV dividing 4; got \[1, 3, 6, 8\]"):
        packed_attention(query, query[:, :3], query[:, :3], PackedSequences.from_lengths([6]), is_causal=True)
    for bounds in ([1, 4], [0, 4, 2, 6], [0, 4]):
        with pytest.raises(ValueError, match="start at 0 and never fall, and end at 6 tokens"):
            PackedSequences.from_cu_seqlens(torch.tensor(bounds), tokens=6)
    with pytest.raises(ValueError, match="must be integers"):
        PackedSequences.from_cu_seqlens(torch.tensor([0.0, 6.0]))
    with pytest.raises(ValueError, match="must be 0 or greater"):
        PackedSequences.from_lengths([3, -1])


def test_dropout_of_probabilities():
    query = torch.randn(1, 4, 40, 16)
    packing = PackedSequences.from_lengths([30, 10])
    kept = packed_attention(query, query, query, packing, is_causal=True)
    dropped = packed_attention(query, query, query, packing, is_causal=True, dropout=0.5)
    assert dropped.shape == kept.shape
    assert not torch.allclose(dropped, kept)


def test_the_head_gives_logits_or_their_loss():
    head = ours.CausalLMHead(16, 50)
    hidden, labels = torch.randn(2, 7, 16), torch.randint(50, (2, 7))
    labels[0, 3] = -100
    logits = head(hidden)
    assert logits.shape == (2, 7, 50)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(head(hidden, labels), expected)
    torch.testing.assert_close(head(hidden[:, :-1], shift_labels=labels[:, 1:]), expected)
    with pytest.raises(ValueError, match="labels or shift_labels must be given"):
        ours.causal_lm_loss(hidden, head.weight)


def test_norm_and_mlp_as_modules():
    norm, mlp = ours.RMSNorm(16, eps=1e-5), ours.SwiGLUMLP(16, 24)
    x, residual = torch.randn(3, 16), torch.randn(3, 16)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (16,), norm.weight, 1e-5))
    normed, total = norm(x, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, norm(total))
    wide, total = norm(x.bfloat16(), residual)  # autocast: a residual that stayed in float32
    assert total.dtype is wide.dtype is torch.float32
    torch.testing.assert_close(mlp(x), mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))


def test_patch_embedding_is_the_convolution():
    embed = ours.PatchEmbed(3, 2, 4, 24)
    patches = torch.randn(5, 3 * 2 * 4 * 4)
    expected = embed.proj(patches.view(5, 3, 2, 4, 4)).view(5, 24)
    torch.testing.assert_close(embed(patches), expected)
    assert embed(patches.double()).dtype is torch.float32

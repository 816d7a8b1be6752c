"""The modules over the operators: norm, MLP, loss, patch embedding."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from m4ov_kernels import nn as ours
from m4ov_kernels.nn.plain import is_plain


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


def test_layer_norm_is_pytorchs_module_by_another_class():
    norm = torch.nn.LayerNorm(24, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x, residual = torch.randn(3, 24), torch.randn(3, 24)
    expected, state = norm(x + residual), norm.state_dict()
    norm.__class__ = ours.LayerNorm
    normed, total = norm(x, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, expected)
    assert state.keys() == ours.LayerNorm(24).state_dict().keys()
    wide, total = norm(x.bfloat16(), residual)  # autocast: a residual that stayed in float32
    assert total.dtype is wide.dtype is torch.float32
    plain = ours.LayerNorm(24, elementwise_affine=False)
    torch.testing.assert_close(plain(x), F.layer_norm(x, (24,)))
    with pytest.raises(ValueError, match=r"normalized_shape must be one dimension; got \[3, 24\]"):
        ours.LayerNorm((3, 24))(x)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_vision_mlp(approximate):
    """With the bias in the activation, and with whatever stands in the linear's place called as it is."""
    mlp = ours.VisionMLP(16, 40, approximate=approximate)
    x = torch.randn(7, 16, requires_grad=True)

    def results():
        tensors = [x, *mlp.parameters()]
        out = mlp(x)
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    out = mlp.linear_fc2(F.gelu(mlp.linear_fc1(x), approximate=approximate))
    expected = [out, *torch.autograd.grad(out.square().sum(), [x, *mlp.parameters()])]
    fused = results()
    called = []
    mlp.linear_fc1.register_forward_hook(lambda *_: called.append(True))
    hooked = results()
    assert called, "a hook of the linear was passed by"
    for found in (fused, hooked):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        mlp.linear_fc1._forward_hooks.clear()
        assert mlp(x).dtype is torch.bfloat16


def test_gelu_as_a_module():
    gelu = torch.nn.GELU()
    x = torch.randn(9)
    expected = gelu(x)
    gelu.__class__ = ours.GELU
    torch.testing.assert_close(gelu(x), expected)


def test_patch_embedding_is_the_convolution():
    embed = ours.PatchEmbed(3, 2, 4, 24)
    patches = torch.randn(5, 3 * 2 * 4 * 4)
    expected = embed.proj(patches.view(5, 3, 2, 4, 4)).view(5, 24)
    torch.testing.assert_close(embed(patches), expected)
    assert embed(patches.double()).dtype is torch.float32


def test_position_embeddings_are_added_where_patches_stand():
    table = ours.PositionEmbedding(16, 8)
    grid = torch.tensor([[2, 4, 4]])  # as large as the table: nothing is resampled
    hidden = torch.randn(32, 8)
    rows = torch.arange(4).view(2, 1, 2, 1).expand(2, 2, 2, 2).flatten()
    columns = torch.arange(4).view(1, 2, 1, 2).expand(2, 2, 2, 2).flatten()
    expected = hidden + table.weight[rows * 4 + columns].repeat(2, 1)
    torch.testing.assert_close(table(hidden, grid, 2), expected)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_text_attention_of_samples_in_a_row(qk_norm):
    rotation = ours.Rotation(10000.0, (2, 1, 1), True)
    attention = ours.TextAttention(12, 4, 2, 8, rotation=rotation, qk_norm=qk_norm, bias=True)
    hidden, bounds = torch.randn(9, 12), torch.tensor([0, 4, 9])
    positions = torch.cat([torch.arange(4), torch.arange(5)]).expand(3, -1)
    together = attention(hidden, positions, bounds)
    for start, end in ((0, 4), (4, 9)):
        q, k, v = attention.project(hidden[start:end], positions[:, start:end])
        alone = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), is_causal=True, enable_gqa=True)
        torch.testing.assert_close(together[start:end], attention.o_proj(alone.transpose(0, 1).flatten(1)))
    # Text has one position; the rotation is plain RoPE then, and norms come before it.
    one = attention.project(hidden[:4], torch.arange(4))
    for a, b in zip(one, attention.project(hidden[:4], torch.arange(4).expand(3, -1)), strict=True):
        torch.testing.assert_close(a, b)
    first = attention.q_proj(hidden[:1]).view(1, 4, 8)  # position 0 is not rotated
    torch.testing.assert_close(one[0][:1], attention.q_norm(first) if qk_norm else first)


def test_vision_attention_of_images_in_a_row():
    attention = ours.VisionAttention(16, 2)
    hidden, grid = torch.randn(12, 16), torch.tensor([[1, 2, 2], [1, 2, 4]])
    order = ours.PatchOrder(grid, 2)
    together = attention(hidden, order, torch.tensor([0, 4, 12]))
    for start, end, image in ((0, 4, grid[:1]), (4, 12, grid[1:])):
        q, k, v = (x.transpose(0, 1) for x in attention.project(hidden[start:end], ours.PatchOrder(image, 2)))
        alone = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        torch.testing.assert_close(together[start:end], attention.proj(alone))


def test_what_has_something_around_its_call_is_not_plain():
    linear = torch.nn.Linear(3, 3)
    assert is_plain(linear)
    assert is_plain(linear, torch.nn.Linear)
    assert not is_plain(linear, torch.nn.Embedding)
    handle = linear.register_forward_hook(lambda *_: None)
    assert not is_plain(linear)
    handle.remove()
    assert is_plain(linear)
    torch.nn.utils.parametrizations.weight_norm(linear)
    assert not is_plain(linear)

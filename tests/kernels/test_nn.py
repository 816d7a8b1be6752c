"""The modules over the operators: norm, MLP, loss, patch embedding."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from m4ov_kernels import nn as ours


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

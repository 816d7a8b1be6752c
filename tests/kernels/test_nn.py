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


def test_patch_embedding_is_the_convolution():
    embed = ours.PatchEmbed(3, 2, 4, 24)
    patches = torch.randn(5, 3 * 2 * 4 * 4)
    expected = embed.proj(patches.view(5, 3, 2, 4, 4)).view(5, 24)
    torch.testing.assert_close(embed(patches), expected)
    assert embed(patches.double()).dtype is torch.float32

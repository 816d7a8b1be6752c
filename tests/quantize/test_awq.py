"""The search for scales and ranges, and what is left in 16 bits."""

from __future__ import annotations

import pytest
import torch

from m4ov.quantize import awq
from m4ov.quantize.calibration import Inputs
from m4ov.quantize.linears import Fold, Group
from m4ov.quantize.schemes import SCHEMES
from m4ov.quantize.sensitivity import Keep, Sensitivity, choose

W4 = SCHEMES["w4"]


def case(K: int = 128, N: int = 64):
    """Inputs of which some features are large, as those of language models."""
    generator = torch.Generator().manual_seed(3)
    spread = torch.exp(1.5 * torch.randn(K, generator=generator))
    rows = torch.randn(256, K, generator=generator) * spread
    weight = torch.randn(N, K, generator=generator)
    return weight, Inputs(rows, rows.abs().mean(0), 256)


def error(weight: torch.Tensor, rounded: torch.Tensor, rows: torch.Tensor) -> float:
    return float((rows @ (rounded - weight).t()).square().mean())


def test_a_scale_makes_outputs_better_and_belongs_to_its_features():
    weight, inputs = case()
    index = torch.arange(128) % 32  # four features share a scale
    for fold in (Fold("norm", 0, torch.arange(128)), Fold("norm", 0, index)):
        scale = awq.search([weight], inputs, fold, W4, 32, torch.bfloat16)
        assert scale is not None
        assert scale.shape == (fold.features,)
        columns = scale[fold.index]
        scaled = W4.pack(weight * columns, 32, torch.bfloat16).dequantize(torch.float32) / columns
        plain = W4.pack(weight, 32, torch.bfloat16).dequantize(torch.float32)
        assert error(weight, scaled, inputs.rows) < 0.8 * error(weight, plain, inputs.rows)


def test_no_scale_where_none_helps():
    weight, inputs = case()
    flat = torch.ones_like(inputs.rows)  # all features alike: every α gives the same scale
    fold = Fold("norm", 0, torch.arange(128))
    assert awq.search([weight], Inputs(flat, flat.mean(0), 256), fold, W4, 32, torch.bfloat16) is None


def test_clipping_makes_outputs_better_but_not_of_queries():
    weight, inputs = case()
    weight[:, ::32] *= 6  # one weight of each group far out
    clipped = awq.clip("mlp.down_proj", weight, inputs, W4, 32, torch.bfloat16)
    packed = [W4.pack(w, 32, torch.bfloat16).dequantize(torch.float32) for w in (clipped, weight)]
    errors = [error(weight, rounded, inputs.rows) for rounded in packed]
    assert errors[0] < errors[1]
    assert torch.equal(awq.clip("attn.qkv", weight, inputs, W4, 32, torch.bfloat16), weight)
    assert torch.equal(awq.clip("mlp.up_proj", weight, inputs, SCHEMES["w8a8"], -1, torch.bfloat16), weight)


GROUPS = [Group(("a.q_proj", "a.k_proj"), "text"), Group(("b",), "text"), Group(("c",), "text")]
SIZES = {"a.q_proj": 100, "a.k_proj": 100, "b": 100, "c": 700}
FOUND = {
    "a.q_proj": Sensitivity(0.1, 0.02),
    "a.k_proj": Sensitivity(0.1, 0.02),
    "b": Sensitivity(0.2, 0.03),
    "c": Sensitivity(0.3, 0.0),
}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("0", []),
        ("1", ["a.q_proj", "a.k_proj"]),  # a group stays whole
        ("3", ["a.q_proj", "a.k_proj", "b"]),
        ("auto", []),  # 5% of 1,000 weights: none is so small
        ("10%", ["b"]),  # the worst does not fit
        ("30%", ["a.q_proj", "a.k_proj", "b"]),
        ("100%", ["a.q_proj", "a.k_proj", "b"]),  # c does no harm
    ],
)
def test_what_is_kept(text, kept):
    chosen = choose(GROUPS, SIZES, FOUND, 0.5, Keep.parse(text))
    assert [name for group in chosen for name in group.names] == kept
    assert all("nats" in reason for reason in chosen.values())


@pytest.mark.parametrize("text", ["", "-1", "many", "101%", "1.5"])
def test_what_keep_cannot_mean(text):
    with pytest.raises(ValueError, match="--keep: expected auto"):
        Keep.parse(text)

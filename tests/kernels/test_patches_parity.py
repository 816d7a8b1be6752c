"""Patched against unpatched, every family: logits and the gradient of every parameter, on random small models."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor

import m4ov_kernels
from m4ov_kernels.gemm import reference
from m4ov_kernels.nn import Fp8Linear, Int4Linear, Int8Linear
from m4ov_kernels.patches import patch
from tests.kernels import tiny_models as tiny
from tests.kernels.numerics import assert_accurate
from tests.kernels.steps import as_dtype, assert_same, assert_same_step, in_float64, logits_of, step


def drawn(family: str, **options):
    """A random model, unpatched and patched."""
    seed = random.Random(int(torch.randint(2**31, ())))
    plain = tiny.model(
        family,
        heads=seed.choice([(4, 2), (4, 4), (6, 2), (2, 1), (3, 3)]),
        head_dim=seed.choice([16, 32]),
        layers=2,
        tie=seed.random() < 0.3,
        **options,
    )
    patched = copy.deepcopy(plain)
    patch(patched)
    return plain, patched


@pytest.mark.parametrize("layout", [tiny.packed, tiny.padded])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_step_equals_hugging_face(family, layout):
    """Several images and videos of odd sizes in some samples, none in others, an image alone."""
    plain, patched = drawn(family)
    batch = layout(plain, tiny.mixed_samples(plain))
    expected, exact = step(plain, batch, use_cache=False), in_float64(plain, batch, use_cache=False)
    assert_same_step(step(patched, batch, use_cache=False), expected, exact)
    with m4ov_kernels.backend("reference"):
        assert_same_step(step(patched, batch, use_cache=False), expected, exact)


@pytest.mark.parametrize("layout", [tiny.packed, tiny.padded])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_equal_hugging_face(family, layout):
    plain, patched = drawn(family)
    batch = layout(plain, tiny.mixed_samples(plain))
    with torch.no_grad():
        assert_same(logits_of(patched, batch, use_cache=False), logits_of(plain, batch, use_cache=False))


@pytest.mark.parametrize("what", ["text", "an image", "a video"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_one_kind_of_input_alone(family, what):
    plain, patched = drawn(family)
    parts = {
        "text": lambda: [tiny.sample(plain, 13, []), tiny.sample(plain, 8, [])],
        "an image": lambda: [tiny.sample(plain, 2, [(6, 4)])],
        "a video": lambda: [tiny.sample(plain, 2, [], [(3, 4, 6)])],
    }[what]()
    for layout in (tiny.packed, tiny.padded):
        batch = layout(plain, parts)
        expected = step(plain, batch, use_cache=False)
        exact = in_float64(plain, batch, use_cache=False)
        assert_same_step(step(patched, batch, use_cache=False), expected, exact)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_equals_unpacked(family):
    """Each sample alone, against all in one row: logits and the sum of the gradients."""
    plain, patched = drawn(family)
    parts = tiny.mixed_samples(plain)
    alone = [tiny.packed(plain, [part]) for part in parts]
    together = {**tiny.packed(plain, parts), "cu_seq_lens_q": tiny.cu_seqlens(parts)}
    assert_same(logits_of(patched, together), torch.cat([logits_of(patched, batch) for batch in alone], 1))
    count = int((together["labels"][:, 1:] != -100).sum())
    packed = step(patched, together, num_items_in_batch=count)
    patched.zero_grad()
    losses = []
    for batch in alone:
        if int((batch["labels"][:, 1:] != -100).sum()):
            losses.append(patched(**batch, num_items_in_batch=count).loss)
            losses[-1].backward()
    sums = {name: value.grad for name, value in patched.named_parameters() if value.grad is not None}
    # The sample without labels takes part in the row: its tower's share of the gradients is zero.
    exact = in_float64(plain, together, num_items_in_batch=count, use_cache=False)
    assert_same_step(packed, (torch.stack(losses).sum().detach(), sums), exact)


@pytest.mark.parametrize("layout", [tiny.packed, tiny.padded])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bf16_keeps_the_numerics_rule(family, layout):
    """Judged on all gradients together, each scaled to its largest value: few elements make no statistics."""
    # A router that rounds to another expert is no rounding error.
    plain, patched = drawn(family, **({"mlp_only_layers": [0, 1]} if family == "qwen3_vl_moe" else {}))
    batch = layout(plain, tiny.mixed_samples(plain))
    exact = step(copy.deepcopy(plain).double(), as_dtype(batch, torch.float64), use_cache=False)
    batch = as_dtype(batch, torch.bfloat16)
    theirs, ours = (step(model.to(torch.bfloat16), batch, use_cache=False) for model in (plain, patched))
    # float32, but of bf16 hidden states: bf16's rounding is what the rule should allow for.
    assert_accurate("loss", ours[0].bfloat16(), theirs[0].bfloat16(), exact[0])
    scales = {name: 1 / gradient.abs().max() for name, gradient in exact[1].items() if "k_proj.bias" not in name}

    def together(gradients: dict[str, Tensor]) -> Tensor:
        return torch.cat([(gradients[name].double() * scale).flatten() for name, scale in scales.items()])

    assert_accurate("gradients", together(ours[1]).bfloat16(), together(theirs[1]).bfloat16(), together(exact[1]))


@pytest.mark.parametrize("make", [Int4Linear.from_linear, Int8Linear.from_linear, Fp8Linear.from_linear])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_quantised_model_gives_the_same_logits(family, make, monkeypatch):
    """Every linear layer quantised. Without the rounding of activations, which turns the last bit of a float32 into a
    step: then both compute one smooth function of the same weights."""
    monkeypatch.setattr(reference, "rounded", lambda single, weight, activation, dtype: single.to(dtype))
    plain = tiny.model(family, layers=2)
    for name, module in list(plain.named_modules()):
        if type(module) is torch.nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, make(module))
    patched = copy.deepcopy(plain)
    assert ("linear_cross_entropy", f"lm_head is a {type(plain.lm_head).__name__}, not a Linear") in patch(
        patched
    ).skipped
    batch = tiny.packed(plain, tiny.mixed_samples(plain))
    with torch.no_grad(), m4ov_kernels.backend("reference"):
        assert_same(logits_of(patched, batch, use_cache=False), logits_of(plain, batch, use_cache=False))
    assert patched.train()(**batch).loss.isfinite()

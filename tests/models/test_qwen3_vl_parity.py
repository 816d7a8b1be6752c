"""Our Qwen3-VL against transformers': logits and the gradient of every parameter, on random small models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m4ov_kernels.packing import PackedBatch
from tests.kernels import tiny_models as tiny
from tests.kernels.numerics import assert_accurate
from tests.kernels.steps import as_dtype, assert_same, assert_same_step, in_float64, logits_of
from tests.kernels.steps import step as their_step
from tests.models.pairs import FAMILIES, batch_of, drawn, logits, step

KINDS = {
    "text": lambda owner: [tiny.sample(owner, 13, []), tiny.sample(owner, 8, [])],
    "an image": lambda owner: [tiny.sample(owner, 2, [(6, 4)])],
    "several images": lambda owner: [tiny.sample(owner, 4, [(2, 6), (6, 4), (10, 2)]), tiny.sample(owner, 5)],
    "a video": lambda owner: [tiny.sample(owner, 2, [], [(3, 4, 6)])],
    "everything": tiny.mixed_samples,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_equals_transformers(family, kind):
    theirs, ours = drawn(family)
    parts = KINDS[kind](theirs)
    batch, packed = batch_of(theirs, parts), tiny.packed(theirs, parts)
    assert_same(logits(ours, batch), logits_of(theirs, packed, use_cache=False)[0])
    expected, exact = their_step(theirs, packed, use_cache=False), in_float64(theirs, packed, use_cache=False)
    assert_same_step(step(ours, batch), expected, exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_each_sample_alone(family):
    theirs, ours = drawn(family)
    parts = tiny.mixed_samples(theirs)
    together, alone = batch_of(theirs, parts), [batch_of(theirs, [part]) for part in parts]
    assert_same(logits(ours, together), torch.cat([logits(ours, batch) for batch in alone]))
    expected = step(ours, together)
    ours.zero_grad()
    total = torch.stack([ours.loss(batch).total for batch in alone]).sum() / together.num_labels
    total.backward()
    sums = {name: value.grad for name, value in ours.named_parameters() if value.grad is not None}
    packed = tiny.packed(theirs, parts)
    assert_same_step((total.detach(), sums), expected, in_float64(theirs, packed, use_cache=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_keeps_the_numerics_rule(family):
    """Judged on all gradients together, each scaled to its largest value: few elements make no statistics. Every token
    goes to every expert: a router that rounds to another one is no rounding error."""
    theirs, ours = drawn(family, **({"num_experts_per_tok": 4} if family == "qwen3_vl_moe" else {}))
    parts = tiny.mixed_samples(theirs)
    packed = tiny.packed(theirs, parts)
    exact = in_float64(theirs, packed, use_cache=False)()
    plain = their_step(theirs.to(torch.bfloat16), as_dtype(packed, torch.bfloat16), use_cache=False)
    made = step(ours.to(torch.bfloat16), batch_of(theirs, parts))
    # float32, but of bf16 hidden states: bf16's rounding is what the rule should allow for.
    assert_accurate("loss", made[0].bfloat16(), plain[0].bfloat16(), exact[0])
    # A key's bias has a gradient of nothing but rounding: softmax ignores it.
    scales = {name: 1 / gradient.abs().max() for name, gradient in exact[1].items() if "k_proj.bias" not in name}

    def together(gradients: dict[str, Tensor]) -> Tensor:
        return torch.cat([(gradients[name].double() * scale).flatten() for name, scale in scales.items()])

    assert made[1].keys() == plain[1].keys()
    assert_accurate("gradients", together(made[1]).bfloat16(), together(plain[1]).bfloat16(), together(exact[1]))


def test_the_balance_loss_of_experts_is_transformers():
    theirs, ours = drawn("qwen3_vl_moe", router_aux_loss_coef=0.5)
    parts = tiny.mixed_samples(theirs)
    packed = tiny.packed(theirs, parts)
    options = {"use_cache": False, "output_router_logits": True}
    expected, exact = their_step(theirs, packed, **options), in_float64(theirs, packed, **options)
    assert_same_step(step(ours, batch_of(theirs, parts), balance=True), expected, exact)


def test_a_shared_image_counts_for_all_that_show_it():
    """One image asked about three times gives what three copies give, and the tower sees it once."""
    theirs, ours = drawn("qwen3_vl")
    image = tiny.sample(theirs, 5, [(4, 6)])
    parts = [image, tiny.sample(theirs, 7, [(2, 2)]), image, image]
    copies = batch_of(theirs, parts)
    first = batch_of(theirs, parts[:2])
    shared = first[[0, 1, 0, 0]]
    assert len(shared.images.grids) == 2
    assert len(copies.images.grids) == 4
    assert_same(logits(ours, shared), logits(ours, copies))
    exact = in_float64(theirs, tiny.packed(theirs, parts), use_cache=False)
    assert_same_step(step(ours, shared), step(ours, copies), exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_without_vision_may_run_the_tower(family):
    """`always_vision`: the same bits, and gradients of zero, not None, in the whole tower."""
    theirs, ours = drawn(family)
    batch = batch_of(theirs, KINDS["text"](theirs))
    loss, grads = step(ours, batch)
    ours.always_vision = True
    joined, joined_grads = step(ours, batch)
    assert torch.equal(loss, joined)
    names = [name for name, _ in ours.named_parameters()]
    assert set(names) == joined_grads.keys()
    assert {name for name in names if "visual" in name} == set(names) - grads.keys()
    for name, grad in joined_grads.items():
        assert torch.equal(grad, grads.get(name, torch.zeros_like(grad))), name


def test_a_batch_without_labels_has_a_loss_of_zero():
    theirs, ours = drawn("qwen3_vl")
    parts = [tiny.sample(theirs, 1, [(4, 4)])]
    batch: PackedBatch = batch_of(theirs, parts)
    assert batch.num_labels == 0
    loss = ours.loss(batch)
    loss.total.backward()
    assert loss.num_labels == 0
    assert loss.total.item() == 0.0
    assert all(bool((p.grad == 0).all()) for p in ours.parameters() if p.grad is not None)

"""Which linears are found, and that a scale folded into what makes their input changes nothing."""

from __future__ import annotations

import pytest
import torch

from m4ov.quantize import awq
from m4ov.quantize.calibration import collect
from m4ov.quantize.linears import find, is_router, linears_of
from tests.kernels import tiny_models

EXPECTED = {  # groups that have a fold, by their last names
    "qwen3_vl": {"q_proj", "o_proj", "gate_proj", "down_proj", "qkv", "proj", "linear_fc1"},
    "qwen3_vl_moe": {"q_proj", "o_proj", "gate_proj", "down_proj", "qkv", "proj", "linear_fc1"},
    "qwen2_5_vl": {"q_proj", "o_proj", "gate_proj", "down_proj", "qkv", "proj", "0"},
    "llava_onevision": {"q_proj", "o_proj", "out_proj", "gate_proj", "down_proj", "fc1"},
}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_linear_is_in_one_group(family):
    model = tiny_models.model(family)
    names = [name for group in find(model) for name in group.names]
    assert sorted(names) == sorted(name for name in linears_of(model) if not is_router(name))
    assert {group.part for group in find(model)} == {"text", "vision", "merger", "lm_head"}
    folded = {group.names[0].rpartition(".")[2] for group in find(model) if group.fold is not None}
    assert folded == EXPECTED[family]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_folded_scale_changes_nothing(family):
    torch.manual_seed(0)
    model = tiny_models.model(family).eval()
    batch = tiny_models.packed(model, tiny_models.samples(model))
    with torch.no_grad():
        before = model(**batch).logits
        groups = [group for group in find(model) if group.fold is not None]
        for group in groups:
            awq.apply(model, group, torch.rand(group.fold.features) * 4 + 0.25)
        after = model(**batch).logits
    noise = float((after - before).abs().max() / before.abs().max())
    assert noise < 1e-4, noise  # of float32
    # A fold at a wrong place is no noise.
    awq.apply(model, groups[0], torch.full((groups[0].fold.features,), 2.0))
    with torch.no_grad():
        model.get_submodule(groups[0].names[0]).weight.mul_(2)
        assert float((model(**batch).logits - before).abs().max() / before.abs().max()) > 1e-2


def test_what_enters_each_group_is_sampled():
    torch.manual_seed(0)
    model = tiny_models.model().eval()
    groups = find(model)
    batches = [tiny_models.packed(model, tiny_models.samples(model)) for _ in range(3)]
    came: dict[str, list[torch.Tensor]] = {}
    hooks = [
        model.get_submodule(group.names[0]).register_forward_pre_hook(
            lambda _, arguments, name=group.names[0]: came.setdefault(name, []).append(arguments[0].flatten(0, -2))
        )
        for group in groups
    ]
    found = collect(model, groups, batches, rows=12)
    for hook in hooks:
        hook.remove()
    for group in groups:
        rows = torch.cat(came[group.names[0]])
        assert found[group].count == len(rows)
        torch.testing.assert_close(found[group].mean, rows.abs().mean(0))
        assert 0 < len(found[group].rows) <= 12
        assert all(bool((rows == row).all(1).any()) for row in found[group].rows)
    text = tiny_models.packed(model, [tiny_models.sample(model, 9, [])])
    with pytest.raises(ValueError, match="--calibrate: expected data that reaches every linear"):
        collect(model, groups, [text])

"""References: frozen, an average, or the model without its adapters; and what they leave as it was."""

from __future__ import annotations

import os

import pytest
import torch

from m4ov.rl.reference import Reference
from m4ov.rl.responses import response_logprob
from m4ov.rl_recipe import ReferenceConfig
from tests.rl import small

SEED = int(os.environ["M4OV_TEST_SEED"])


def moved(policy, seed=1, size=0.05):
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight += size * torch.randn(weight.shape, generator=random, dtype=weight.dtype)


def test_frozen_stays_as_the_policy_began():
    policy, pack = small.model(), small.batch(SEED)
    before = response_logprob(policy, pack)
    reference = Reference(ReferenceConfig("frozen"), policy)
    assert reference.tensors(dict(policy.named_parameters())) == {}
    moved(policy)
    reference.after_step()
    policy.train()
    found = reference.logprob(policy, pack)
    assert torch.equal(found, before)
    assert not found.requires_grad
    assert policy.training
    assert not torch.allclose(response_logprob(policy, pack), before)


def test_an_average_of_weights():
    """aₙ = decay · aₙ₋₁ + (1 − decay) · wₙ, in float32 behind a policy in bfloat16; what a checkpoint holds goes on."""
    policy = small.model(dtype=torch.bfloat16)
    weights = {name: weight.detach().float() for name, weight in policy.named_parameters()}
    reference = Reference(ReferenceConfig("ema", decay=0.75), policy)
    saved = reference.tensors(weights)
    assert saved.keys() == {f"reference.{name}" for name in weights}
    reference.begin(resumed=False)
    expected = {name: weight.clone() for name, weight in weights.items()}
    random = torch.Generator().manual_seed(SEED)
    for _ in range(3):
        for name, weight in weights.items():
            weight += 0.01 * torch.randn(weight.shape, generator=random)
            expected[name] = 0.75 * expected[name] + 0.25 * weight
        reference.after_step()
    for name, weight in reference.model.named_parameters():
        torch.testing.assert_close(reference.averages[name], expected[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(weight, reference.averages[name].bfloat16())
    kept = {name: tensor.clone() for name, tensor in saved.items()}

    again = Reference(ReferenceConfig("ema", decay=0.75), policy)
    for name, tensor in again.tensors(weights).items():
        tensor.copy_(kept[name])  # as a checkpoint is loaded
    again.begin(resumed=True)
    for one, other in zip(again.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_without_adapters():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    policy, pack = small.model(), small.batch(SEED)
    before = response_logprob(policy, pack)
    with pytest.raises(ValueError, match=r"reference\.kind: lora-off needs a model with adapters"):
        Reference(ReferenceConfig("lora-off"), policy)
    options = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(options, policy)
    reference = Reference(ReferenceConfig("lora-off"), policy)
    trained = {name for name, weight in policy.named_parameters() if weight.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    policy.train()
    with_adapters = response_logprob(policy, pack)
    assert not torch.allclose(with_adapters, before)
    torch.testing.assert_close(reference.logprob(policy, pack), before, rtol=1e-12, atol=1e-12)
    assert policy.training
    assert {name for name, weight in policy.named_parameters() if weight.requires_grad} == trained
    assert torch.equal(response_logprob(policy, pack), with_adapters)
    with pytest.raises(KeyError), reference.policy(policy):
        raise KeyError("in the middle")
    assert torch.equal(response_logprob(policy, pack), with_adapters)


def test_none_is_none():
    policy = small.model()
    reference = Reference(ReferenceConfig(), policy)
    assert not reference.present
    with pytest.raises(ValueError, match=r"reference\.kind: expected another than none"):
        reference.logprob(policy, small.batch(SEED))
    with pytest.raises(ValueError, match=r"reference\.kind: expected none, frozen, ema, lora-off"):
        ReferenceConfig("teacher")

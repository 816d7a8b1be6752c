"""Weights that change, and weights packed in eight or four bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from m4ov.generate import Engine, SamplingOptions
from m4ov_kernels import invariant
from m4ov_kernels.nn import Fp8Linear, Int4Linear, Int8Linear
from tests.generate.asked import packed, same, scored, whole, words
from tests.models.pairs import drawn

OPTIONS = SamplingOptions(max_tokens=8, samples=2, seed=5, ignore_end=True)


def model(**options):
    return drawn("qwen3_vl", layers=2, **options)[1]


def train(ours):
    """A step of an optimizer, in place."""
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.05)
    for parameter in ours.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    ours.zero_grad()


def test_a_trainers_step_is_seen_at_the_next_request():
    """The engine samples from the trainer's own parameters: no copy, no call, and the same bits as a new engine."""
    ours = model()
    engine = Engine(ours)
    prompts = words(5, 9)
    before = engine.generate(prompts, OPTIONS)
    train(ours)
    after = engine.generate(prompts, OPTIONS)
    for old, new, fresh in zip(before, after, Engine(ours).generate(prompts, OPTIONS), strict=True):
        same(new, fresh)
        assert [(a.weights_version, b.weights_version) for a, b in zip(old, new, strict=True)] == [(0, 1)] * 2
        assert not torch.equal(old[0].logprobs, new[0].logprobs)
    pairs = [(prompt, made[0], OPTIONS) for prompt, made in zip(prompts, after, strict=True)]
    assert all(map(torch.equal, scored(ours, pairs), [made.logprobs for _, made, _ in pairs]))
    ours.lm_head.weight = nn.Parameter(torch.randn_like(ours.lm_head.weight))  # another parameter, not a write
    engine.generate(prompts, OPTIONS)
    assert engine.weights_version == 2


def test_weights_do_not_change_in_the_middle_of_a_generation():
    ours = model()
    engine = Engine(ours)
    prompts = words(5, 9)
    numbers = [engine.submit(prompt, OPTIONS) for prompt in prompts]
    for _ in range(3):
        engine.step()
    with pytest.raises(RuntimeError, match="update_weights: 4 samples are running"):
        engine.update_weights()
    train(ours)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"weights were changed while 4 samples are running; restart\(\)"):
            engine.step()
    assert (engine.running, engine.weights_version) == (4, 0)
    later = engine.submit(prompts[0], OPTIONS)
    assert engine.restart() == 4
    assert (engine.running, engine.waiting) == (0, 6)
    while engine.running or engine.waiting:
        engine.step()
    found = engine.poll()
    fresh = Engine(ours)
    for number, prompt in zip([*numbers, later], [*prompts, prompts[0]], strict=True):
        same(found[number], fresh.generate([prompt], [OPTIONS])[0])
        assert {made.weights_version for made in found[number]} == {1}
    assert engine.counts["restarted"] == 4
    assert engine._slab.free_tokens == engine._slab.tokens


def test_only_the_samples_that_run_are_begun_again():
    ours = model()
    (prompt,) = words(5)
    free = SamplingOptions(max_tokens=12, samples=5, ignore_end=True)
    made = Engine(ours, end_token_ids=[]).generate([prompt], free)[0]
    token = int(made[2].tokens[1])
    options = SamplingOptions(max_tokens=12, samples=5, stop_token_ids=[token])
    engine = Engine(ours, end_token_ids=[])
    number = engine.submit(prompt, options)
    engine.step()
    engine.step()
    running = engine.running
    assert running < 5
    engine.update_weights(running="restart")
    while engine.running or engine.waiting:
        engine.step()
    found = engine.poll()[number]
    assert sorted(made.weights_version for made in found) == [0] * (5 - running) + [1] * running
    same(found, Engine(ours, end_token_ids=[]).generate([prompt], options)[0])


def test_weights_come_by_name_all_or_none():
    ours, other = model(tie=True), model(tie=True)
    other = copy.deepcopy(ours)
    train(other)
    engine = Engine(ours)
    prompts = words(5, 9)
    state = dict(other.named_parameters())
    name = next(iter(state))
    before = copy.deepcopy(ours.state_dict())
    for broken, message in (
        ({key: value for key, value in state.items() if key != name}, f"1 parameters missing .{name}., 0 unknown"),
        ({**state, "more": torch.ones(2)}, "0 parameters missing .*, 1 unknown .more"),
        ({**state, name: torch.ones(3)}, rf"{name} must be \[.*\]; got \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.update_weights(broken)
        assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
    assert engine.update_weights({key: value.double() for key, value in other.state_dict().items()}) == 1
    made, expected = engine.generate(prompts, OPTIONS), Engine(other).generate(prompts, OPTIONS)
    for ours_made, theirs in zip(made, expected, strict=True):
        same(ours_made, theirs)
    with pytest.raises(ValueError, match="running must be 'refuse' or 'restart'; got 'wait'"):
        engine.update_weights(running="wait")


GROUPS = {64: 64, 128: 128, 96: 32}  # the largest that divide the widths of these models
PACKED = {
    "int8": Int8Linear.from_linear,
    "int4": lambda linear: Int4Linear.from_linear(linear, group_size=GROUPS[linear.in_features], activation="bf16"),
    "fp8": lambda linear: Fp8Linear.from_linear(linear, activation="bf16"),
}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_weights_are_those_of_a_packed_model(kind):
    """Greedily and at random: the bits of our own model whose linears were packed by hand; packed anew after a step."""
    ours = model(heads=(4, 2), head_dim=32).to(torch.bfloat16)
    engine = Engine(ours, weights=kind)
    prompts = words(5, 9, 20)
    for version in range(2):
        quantised = copy.deepcopy(ours)
        for layer in quantised.model.language_model.layers:
            for block, names in (
                (layer.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj")),
                (layer.mlp, ("gate_proj", "up_proj", "down_proj")),
            ):
                for name in names:
                    setattr(block, name, PACKED[kind](getattr(block, name)))
        made = engine.generate(prompts, OPTIONS)
        pairs = [(prompt, one, OPTIONS) for prompt, some in zip(prompts, made, strict=True) for one in some]
        found = scored(quantised, pairs)
        assert all(map(torch.equal, found, [one.logprobs for _, one, _ in pairs]))
        assert {one.weights_version for _, one, _ in pairs} == {version}
        plain = scored(ours, pairs)
        assert not all(map(torch.equal, found, plain))
        train(ours)


def test_fast_numerics_take_packed_weights_too():
    ours = model(heads=(4, 2), head_dim=32).to(torch.bfloat16)
    (prompt,) = words(12)
    for kind in PACKED:
        made = Engine(ours, weights=kind, numerics="fast").generate([prompt], OPTIONS)[0]
        (trained,) = scored(ours, [(prompt, made[0], OPTIONS)])
        assert (trained - made[0].logprobs).abs().max() < 2.0
        assert all(len(one.tokens) == 8 for one in made)


def test_experts_are_not_packed():
    _, ours = drawn("qwen3_vl_moe")
    with pytest.raises(ValueError, match="weights='int8' of a mixture of experts is not built"):
        Engine(ours, weights="int8")


def test_a_layer_of_another_kind_is_called():
    """As LoRA's: what is no plain linear is called as it is, and keeps its bits inside ``invariant()``."""
    ours = model()

    class Twice(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    ours.model.language_model.layers[0].mlp.down_proj.__class__ = Twice
    ours.model.language_model.layers[1].self_attn.o_proj.__class__ = Twice
    (prompt,) = words(9)
    made = Engine(ours).generate([prompt], OPTIONS)[0]
    batch = packed([whole(prompt, one) for one in made])
    with invariant():
        assert ours(batch).hidden_states.isfinite().all()
    assert all(map(torch.equal, scored(ours, [(prompt, one, OPTIONS) for one in made]), [one.logprobs for one in made]))

"""The engine against transformers' ``generate``, token for token, and a trainer's packed forward, bit by bit."""

from __future__ import annotations

import random

import pytest
import torch

from m4ov.generate import Engine, SamplingOptions
from m4ov_kernels.numerics import certify
from tests.generate.asked import END, KINDS, only_words, prompt, same, scored, their_answer, words
from tests.models.pairs import FAMILIES, drawn, ours_of

NEW = 12
DTYPES = (torch.float32, torch.bfloat16)


def mixed(owner):
    return [part for kind in KINDS.values() for part in kind(owner)]


@pytest.mark.parametrize("numerics", ["shared", "fast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers_token_for_token(family, numerics):
    """Text, an image, several images, a video, all at once; dense and with experts."""
    theirs, _ = drawn(family, tie=False)
    ours = ours_of(only_words(theirs.eval()))
    parts = mixed(theirs)
    engine = Engine(ours, end_token_ids=[END], numerics=numerics)
    made = engine.generate([prompt(part) for part in parts], SamplingOptions(max_tokens=NEW, temperature=0))
    for part, (completion,) in zip(parts, made, strict=True):
        expected = their_answer(theirs, part, NEW)
        assert completion.tokens.tolist() == expected
        assert completion.finish_reason == ("stop" if expected[-1] == END else "length")
    assert engine.counts["completions"] == len(parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_the_trainers_to_the_bit(family, dtype):
    """Several samples of each prompt, at temperatures, beside each other; scored all together and each by itself."""
    theirs, ours = drawn(family)
    ours = ours.to(dtype)
    prompts = [prompt(part) for part in mixed(theirs)]
    options = [
        SamplingOptions(max_tokens=NEW, temperature=temperature, top_k=top_k, top_p=top_p, seed=place, samples=2)
        for place, (temperature, top_k, top_p) in enumerate(
            [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 20, 0.9), (0.0, 0, 1.0)] * 2
        )
    ]
    engine = Engine(ours, max_running=7)
    made = engine.generate(prompts, options[: len(prompts)])
    asked = [
        (prompt, completion, option)
        for prompt, completions, option in zip(prompts, made, options, strict=False)
        for completion in completions
    ]
    random.Random(int(torch.randint(2**31, ()))).shuffle(asked)
    sampled = torch.cat([completion.logprobs for _, completion, _ in asked])
    for together in (True, False):
        trained = torch.cat(scored(ours, asked, together=together))
        assert (trained - sampled).abs().max() == 0.0
        assert certify(sampled, trained).total.identical == len(sampled)
    assert len(sampled) == sum(len(completion.tokens) for _, completion, _ in asked)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prefix_is_a_prefix_read_anew(family, dtype):
    """Sample i of seed s is sample 0 of seed s + i, which another request draws after reading the prompt itself."""
    theirs, ours = drawn(family)
    ours = ours.to(dtype)
    asked = [prompt(part) for part in (*KINDS["several images"](theirs), *KINDS["text"](theirs))]
    options = SamplingOptions(max_tokens=NEW, temperature=0.9, top_p=0.95, seed=41, samples=4)
    shared = Engine(ours)
    made = [completion for item in asked for completion in shared.generate([item], options)[0]]
    tokens = sum(len(item.input_ids) for item in asked)
    assert shared.counts["prefilled"] == tokens
    alone = Engine(ours)
    single = [
        alone.generate([item], SamplingOptions(max_tokens=NEW, temperature=0.9, top_p=0.95, seed=41 + place))[0][0]
        for item in asked
        for place in range(4)
    ]
    assert alone.counts["prefilled"] == 4 * tokens
    same(made, single)


@pytest.mark.parametrize("dtype", DTYPES)
def test_company_changes_nothing(dtype):
    """A request alone; among others that came before, with and after it; on other threads, at other places of the
    slab."""
    theirs, ours = drawn("qwen3_vl")
    ours = ours.to(dtype)
    chosen = random.Random(int(torch.randint(2**31, ())))
    parts = [prompt(part) for part in mixed(theirs)]
    options = [
        SamplingOptions(max_tokens=chosen.randint(1, 2 * NEW), temperature=chosen.choice([0.0, 0.6, 1.0]), seed=place)
        for place in range(len(parts))
    ]
    alone = [Engine(ours).generate([part], [option])[0] for part, option in zip(parts, options, strict=True)]
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        engine = Engine(ours, max_running=chosen.randint(2, 6), prefill_tokens=chosen.randint(1, 60))
        numbers, found = {}, {}
        order = chosen.sample(range(len(parts)), len(parts))
        while len(found) < len(parts):
            if order and chosen.random() < 0.5:
                place = order.pop()
                numbers[engine.submit(parts[place], options[place])] = place
            engine.step()
            found |= {numbers[number]: completions for number, completions in engine.poll().items()}
        torch.set_num_threads(threads)
        for place, completions in found.items():
            same(completions, alone[place])
        assert engine.running == engine.waiting == 0


def test_without_shared_numerics_the_two_differ():
    """What the tests of bits could not be without it: PyTorch's own products."""
    _, ours = drawn("qwen3_vl", layers=3, hidden_size=320, intermediate_size=800)
    asked = words(20, 33, 47)
    options = SamplingOptions(max_tokens=24)
    engine = Engine(ours, numerics="fast")
    made = engine.generate(asked, options)
    pairs = [(item, completions[0], options) for item, completions in zip(asked, made, strict=True)]
    trained = torch.cat(scored(ours, pairs))
    sampled = torch.cat([completion.logprobs for _, completion, _ in pairs])
    assert (trained - sampled).abs().max() > 0
    assert (trained - sampled).abs().max() < 1e-3

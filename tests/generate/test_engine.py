"""Requests that come and go, ends, room, faults: every one of them is answered, and counted."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from m4ov.generate import FINISH_REASONS, Engine, RequestError, SamplingOptions
from m4ov.generate.cache import Slab
from m4ov_kernels.packing import Patches, Sample
from tests.generate.asked import same, words
from tests.kernels import tiny_models as tiny
from tests.models.pairs import drawn


class Letters:
    """A tokenizer: tokens below 26 are a letter each, 26 is two, others nothing."""

    def decode(self, tokens):
        letters = [chr(97 + token) if token < 26 else "qu" if token == 26 else "" for token in tokens]
        return "".join(letters)


def model():
    return drawn("qwen3_vl", layers=2)[1]


def saying(tokens):
    """A model that says these tokens, one after the other, whatever it was asked: its head looks at the position."""
    made = model()

    class Says(nn.Linear):
        def forward(self, hidden_states):
            return self.logits.expand(hidden_states.shape[0], -1)

    made.lm_head.__class__ = Says
    made.lm_head.logits = torch.zeros(tiny.VOCABULARY)
    return made


def spell(engine, text):
    """Make the engine's next draws these letters (greedily), step by step."""
    for letter in text:
        token = 26 if letter == "Q" else ord(letter) - 97
        engine.model.lm_head.logits[:] = 0.0
        engine.model.lm_head.logits[token] = 1.0
        engine.step()


def room_for(config, tokens):
    """``cache_bytes`` of so many tokens of a float32 model."""
    return tokens * Slab.bytes_per_token(config.text, torch.float32)


def total(engine):
    return sum(engine.counts[f"finish_{reason}"] for reason in FINISH_REASONS)


def test_requests_wait_for_room_and_all_are_answered():
    ours = model()
    config = ours.config
    chosen = random.Random(int(torch.randint(2**31, ())))
    engine = Engine(ours, cache_bytes=room_for(config, 64), max_running=5)
    options = [
        SamplingOptions(max_tokens=chosen.randint(1, 12), samples=chosen.randint(1, 3), seed=place)
        for place in range(20)
    ]
    prompts = words(*(chosen.randint(1, 10) for _ in options))
    numbers = [engine.submit(prompt, option) for prompt, option in zip(prompts, options, strict=True)]
    waited, found = 0, {}
    while engine.running or engine.waiting:
        assert engine.step() > 0
        waited += engine.waiting > 0
        assert engine.running <= 5
        found |= engine.poll()
    assert waited
    assert sorted(found) == numbers
    assert engine._slab.free_tokens == engine._slab.tokens
    assert engine.counts["completions"] == total(engine) == sum(option.samples for option in options)
    roomy = Engine(ours)
    for number, option, prompt in zip(numbers, options, prompts, strict=True):
        assert len(found[number]) == option.samples
        same(found[number], roomy.generate([prompt], [option])[0])
    assert engine.step() == 0


def test_what_can_never_have_room_is_refused():
    ours = model()
    engine = Engine(ours, cache_bytes=room_for(ours.config, 40), max_running=4)
    (prompt,) = words(10)
    engine.submit(prompt, SamplingOptions(max_tokens=31))
    with pytest.raises(
        RequestError, match=r"prompt: expected prompt and samples that need at most 40 tokens .* got 41"
    ):
        engine.submit(prompt, SamplingOptions(max_tokens=32))
    with pytest.raises(RequestError, match="samples: expected at most 4, got 5"):
        engine.submit(prompt, SamplingOptions(samples=5))
    assert engine.waiting == engine.counts["requests"] == 1


def image(height=4, width=4):
    return Patches(torch.randn(height * width, tiny.PATCH), (1, height, width))


REFUSED = {
    "nothing": (lambda: Sample(torch.zeros(0, dtype=torch.int64)), "at least one token, got none"),
    "no tensor": (lambda: Sample([1, 2]), "input_ids must be an int64 tensor"),
    "no sample": (lambda: "what is this?", r"expected a m4ov_kernels.packing.Sample, got str"),
    "an unknown token": (lambda: Sample(torch.tensor([3, tiny.VOCABULARY])), f"got {tiny.VOCABULARY}"),
    "a negative token": (lambda: Sample(torch.tensor([3, -1])), "got -1"),
    "as long as the window": (lambda: words(512)[0], "fewer tokens than the window's 512, got 512"),
    "an image token without an image": (
        lambda: Sample(torch.tensor([5, tiny.IMAGE])),
        "as many image tokens as its 0 images have features, 0; got 1",
    ),
    "an image without tokens": (lambda: Sample(torch.tensor([5]), None, [image()]), "features, 4; got 0"),
    "too few patches": (
        lambda: Sample(torch.tensor([tiny.IMAGE]), None, [Patches(torch.randn(3, tiny.PATCH), (1, 2, 2))]),
        r"pixel_values must be \[4,",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_bad_prompt_is_named_and_the_others_are_not_begun(fault):
    make, message = REFUSED[fault]
    engine = Engine(model())
    with pytest.raises(RequestError, match=rf"prompts\[1\]: .*{message}"):
        engine.generate([*words(3), make(), *words(4)], SamplingOptions(max_tokens=2))
    assert engine.running == engine.waiting == 0
    assert not engine.poll()
    assert len(engine.generate(words(3), SamplingOptions(max_tokens=2))[0][0].tokens) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: expected an int of at least 1, got 0"),
        ({"max_tokens": True}, "max_tokens: expected an int"),
        ({"samples": 0}, "samples: expected an int of at least 1, got 0"),
        ({"temperature": -0.1}, "temperature: expected 0 or a finite number above, got -0.1"),
        ({"temperature": float("nan")}, "temperature: .*got nan"),
        ({"temperature": "hot"}, "temperature: expected a number, got 'hot'"),
        ({"top_p": 0}, r"top_p: expected a number in \(0, 1\], got 0"),
        ({"top_k": -1}, "top_k: expected an int of at least 0, got -1"),
        ({"seed": 2**64}, "seed: expected an int of 64 bits"),
        ({"stop": "text"}, "stop: expected a sequence of strings"),
        ({"stop": ["a", ""]}, "stop: .*none of them empty"),
        ({"stop_token_ids": [-1]}, "stop_token_ids: expected token ids"),
    ],
)
def test_bad_options_are_named(values, message):
    with pytest.raises(RequestError, match=message):
        SamplingOptions(**values)


def test_options_that_do_not_fit_the_engine_are_named():
    engine = Engine(model())
    (prompt,) = words(3)
    with pytest.raises(RequestError, match="stop: expected none, as the engine has no tokenizer"):
        engine.submit(prompt, SamplingOptions(stop=["."]))
    with pytest.raises(
        RequestError, match=f"stop_token_ids: expected token ids of 0 to {tiny.VOCABULARY - 1}, got 999"
    ):
        engine.submit(prompt, SamplingOptions(stop_token_ids=[999]))
    with pytest.raises(RequestError, match="expected one for all or 1, one a prompt; got 2"):
        engine.generate([prompt], [SamplingOptions()] * 2)
    with pytest.raises(RequestError, match=r"prompts\[0\]: options: expected SamplingOptions, got dict"):
        engine.generate([prompt], [{}])


def test_engines_that_cannot_be_are_named():
    ours = model()
    with pytest.raises(ValueError, match="numerics must be one of shared, fast; got 'exact'"):
        Engine(ours, numerics="exact")
    with pytest.raises(ValueError, match="weights must be one of model, int8, int4, fp8; got 'int2'"):
        Engine(ours, weights="int2")
    with pytest.raises(ValueError, match="max_running must be an int of at least 1; got 0"):
        Engine(ours, max_running=0)
    with pytest.raises(ValueError, match="cache_bytes must be those of at least one token"):
        Engine(ours, cache_bytes=10)
    with pytest.raises(TypeError, match=r"model must be .*Qwen3VL; got Linear"):
        Engine(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match=r"numerics='shared' cannot be kept: .*got torch.float64 on cpu"):
        Engine(ours.double())
    ours.lm_head.float()
    with pytest.raises(ValueError, match="parameters must be of one dtype"):
        Engine(ours, numerics="fast")
    with torch.device("meta"), pytest.raises(ValueError, match="meta device"):
        Engine(type(ours)(ours.config))


def test_the_window_ends_a_completion():
    engine = Engine(model(), window=20)
    options = SamplingOptions(max_tokens=50, ignore_end=True)
    long, short = engine.generate(words(19, 12), options)
    assert [len(made[0].tokens) for made in (long, short)] == [1, 8]
    assert {made[0].finish_reason for made in (long, short)} == {"window"}
    exact = engine.generate(words(15), SamplingOptions(max_tokens=5))[0][0]
    assert (exact.finish_reason, len(exact.tokens)) == ("length", 5)


def test_an_end_token_ends_a_completion_and_is_its_last():
    ours = model()
    free = SamplingOptions(max_tokens=40, samples=6, ignore_end=True, seed=3)
    (prompt,) = words(5)
    (made,) = Engine(ours, end_token_ids=[9]).generate([prompt], free)
    assert all(len(completion.tokens) == 40 for completion in made)
    ends = {int(made[0].tokens[4]), int(made[1].tokens[11])}
    by_engine = Engine(ours, end_token_ids=ends).generate([prompt], SamplingOptions(max_tokens=40, samples=6, seed=3))
    stop = SamplingOptions(max_tokens=40, samples=6, seed=3, ignore_end=True, stop_token_ids=list(ends))
    by_request = Engine(ours, end_token_ids=[]).generate([prompt], stop)
    same(by_engine[0], by_request[0])
    for whole, cut in zip(made, by_engine[0], strict=True):
        tokens = whole.tokens.tolist()
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        assert cut.tokens.tolist() == (tokens if end is None else tokens[: end + 1])
        assert torch.equal(cut.logprobs, whole.logprobs[: len(cut.tokens)])
        assert cut.finish_reason == ("length" if end is None else "stop")
    assert sum(completion.finish_reason == "stop" for completion in by_engine[0]) >= 2


def test_one_requests_end_is_not_anothers():
    ours = model()
    first, second = words(5, 5)
    engine = Engine(ours, end_token_ids=[])
    free = SamplingOptions(max_tokens=20, seed=1)
    token = int(Engine(ours, end_token_ids=[]).generate([first], [free])[0][0].tokens[3])
    stops = SamplingOptions(max_tokens=20, seed=1, stop_token_ids=[token])
    made = engine.generate([first, first, second], [stops, free, free])
    assert made[0][0].tokens.tolist().index(token) == len(made[0][0].tokens) - 1
    assert (made[0][0].finish_reason, made[1][0].finish_reason) == ("stop", "length")
    assert len(made[1][0].tokens) == len(made[2][0].tokens) == 20


def test_stop_strings_across_the_borders_of_tokens():
    engine = Engine(saying([]), tokenizer=Letters(), end_token_ids=[25], numerics="fast")
    prompts = words(4, 6, 2)
    asked = [("stop at", ["xyabcz", "no"]), ("quit", ["uit"]), ("none", [])]
    numbers = [
        engine.submit(prompt, SamplingOptions(max_tokens=9, temperature=0, stop=stop))
        for prompt, (_, stop) in zip(prompts, asked, strict=True)
    ]
    spell(engine, "xaQitnoz")
    found = {number: made[0] for number, made in engine.poll().items()}
    stopped, quit, ended = (found[number] for number in numbers)
    assert (stopped.finish_reason, stopped.text, len(stopped.tokens)) == ("stop_string", "xaquit", 7)
    assert (quit.finish_reason, quit.text, len(quit.tokens)) == ("stop_string", "xaq", 5)
    assert (ended.finish_reason, ended.text, len(ended.tokens)) == ("stop", "xaquitno", 8)
    assert engine.counts["finish_stop_string"] == 2


def test_logits_that_are_no_numbers_end_their_request_alone():
    """One prompt's image holds a NaN; the others of the same batch go on, and so do those that come later."""
    ours = model()
    bad = Sample(torch.tensor([*[tiny.IMAGE] * 4, 5]), None, [image()])
    bad.images[0].pixel_values[3, 7] = float("nan")
    good = words(6)[0]
    options = SamplingOptions(max_tokens=5, samples=2)
    engine = Engine(ours)
    made = engine.generate([good, bad, good], [options] * 3)
    assert [[completion.finish_reason for completion in one] for one in made] == [
        ["length"] * 2,
        ["nan"] * 2,
        ["length"] * 2,
    ]
    assert all(len(completion.tokens) == len(completion.logprobs) == 0 for completion in made[1])
    same(made[0], made[2])
    same(made[0], Engine(ours).generate([good], options)[0])
    assert engine.counts["finish_nan"] == 2


def test_what_is_aborted_keeps_what_it_has():
    engine = Engine(model(), max_running=3)
    options = SamplingOptions(max_tokens=30, samples=2, ignore_end=True)
    running, waiting = (engine.submit(prompt, options) for prompt in words(5, 6))
    for _ in range(4):
        engine.step()
    engine.abort(running)
    engine.abort(running)
    engine.abort(waiting)
    engine.abort(99)
    found = engine.poll()
    assert [(c.finish_reason, len(c.tokens)) for c in found[running]] == [("aborted", 4)] * 2
    assert [(c.finish_reason, len(c.tokens)) for c in found[waiting]] == [("aborted", 0)] * 2
    assert engine.running == engine.waiting == 0
    assert engine._slab.free_tokens == engine._slab.tokens
    assert engine.counts["completions"] == total(engine) == 4


def test_an_error_while_a_prompt_is_read_loses_nothing(monkeypatch):
    ours = model()
    engine = Engine(ours)
    options = SamplingOptions(max_tokens=6)
    first, second = words(5, 6)
    number = engine.submit(first, options)
    engine.step()
    other = engine.submit(second, options)

    def broken(*_):
        raise MemoryError("no more")

    with monkeypatch.context() as patched:
        patched.setattr(engine._decoder, "prefill", broken)
        with pytest.raises(MemoryError):
            engine.step()
    assert (engine.running, engine.waiting) == (1, 1)
    while engine.running or engine.waiting:
        engine.step()
    found = engine.poll()
    same(found[number], Engine(ours).generate([first], [options])[0])
    same(found[other], Engine(ours).generate([second], [options])[0])


def test_one_set_of_options_gives_each_prompt_its_own_seeds():
    engine = Engine(model())
    (prompt,) = words(5)
    options = SamplingOptions(max_tokens=8, samples=2, seed=2**64 - 3)
    together = engine.generate([prompt] * 3, options)
    alone = engine.generate([prompt], SamplingOptions(max_tokens=8, samples=6, seed=2**64 - 3))[0]
    same([completion for completions in together for completion in completions], alone)
    assert len({tuple(completion.tokens.tolist()) for completion in alone}) > 1

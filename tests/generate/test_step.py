"""A step of decoding in one native call, against the operators one by one: the same bits, and when it is not taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from m4ov.generate import Engine, SamplingOptions
from m4ov.generate.forward import quietly
from m4ov_kernels import backend
from tests.generate.asked import KINDS, prompt, same, words
from tests.models.pairs import drawn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def running(theirs, ours, samples, steps):
    """An engine in the middle of its work: prompts of several lengths, with images and without."""
    engine = Engine(ours, max_running=4 * samples)
    for place, item in enumerate([*words(5, 1, 140), *map(prompt, KINDS["an image"](theirs))][:4]):
        engine.submit(item, SamplingOptions(max_tokens=12, samples=samples, seed=place, ignore_end=True))
    for _ in range(steps):
        engine.step()
    assert engine.running == 4 * samples
    return engine


def places_written(engine, table):
    """The keys and values of the tokens that a step has read, of all layers."""
    there = torch.from_numpy(table[4] + table[5])
    slab = engine._decoder.slab
    return [kept[there].clone() for kept in (*slab.keys, *slab.values)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_call_gives_the_bits_of_the_operators(isa, dtype):
    theirs, ours = drawn("qwen3_vl")
    ours = ours.to(dtype)
    engine = running(theirs, ours, samples=20, steps=3)
    decoder, table = engine._decoder, engine._places()
    assert decoder._step is not None
    threads = torch.get_num_threads()
    found = []
    with torch.no_grad():
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            hidden = decoder.decode(table)
            found.append((hidden, places_written(engine, table)))
        torch.set_num_threads(threads)
        some = decoder.decode(table[:, 17:20].copy())
        decoder._step = None
        with quietly(True):
            expected = decoder.decode(table)
    assert expected.isfinite().all()
    for hidden, kept in found:
        assert torch.equal(hidden, expected)
        assert all(map(torch.equal, kept, places_written(engine, table)))
    assert torch.equal(some, expected[17:20])


def test_completions_are_those_of_the_operators():
    theirs, ours = drawn("qwen3_vl")
    items = [prompt(part) for kind in KINDS.values() for part in kind(theirs)]
    options = SamplingOptions(max_tokens=9, samples=3, seed=4, ignore_end=True)
    made, single = Engine(ours), Engine(ours)
    single._decoder._step = None
    for some, others in zip(made.generate(items, options), single.generate(items, options), strict=True):
        same(some, others)


def test_what_is_not_plain_is_called():
    """A hook, a class of its own, experts, packed weights, other numerics: operator by operator."""

    class Own(nn.Linear):
        pass

    ours = drawn("qwen3_vl", layers=2)[1]
    assert Engine(ours)._decoder._step is not None
    assert Engine(ours, numerics="fast")._decoder._step is None
    assert Engine(ours, weights="int8")._decoder._step is None
    assert Engine(drawn("qwen3_vl_moe")[1])._decoder._step is None
    layer = ours.model.language_model.layers[1]
    handle = layer.mlp.up_proj.register_forward_hook(lambda *_: None)
    assert Engine(ours)._decoder._step is None
    handle.remove()
    assert Engine(ours)._decoder._step is not None
    layer.self_attn.v_proj.__class__ = Own
    assert Engine(ours)._decoder._step is None
    layer.self_attn.v_proj.__class__ = nn.Linear
    layer.input_layernorm.numerics = "fp32"
    assert Engine(ours)._decoder._step is None


def test_an_implementation_that_is_asked_for_serves():
    engine = running(*drawn("qwen3_vl", layers=2), samples=1, steps=2)
    engine._decoder._step = None if engine._decoder._step is None else _never
    with (
        backend("reference"),
        pytest.raises(RuntimeError, match="reference"),
    ):  # shared numerics are not to be had of it
        engine.step()


def _never(table):
    raise AssertionError("the compiled step was called")

"""Draws, and what they choose: against definitions, transformers' filters, and the distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from m4ov.generate import cache, sampling
from m4ov.generate.cache import Slab
from m4ov.models.qwen3_vl import Config

MASK = 2**64 - 1


def splitmix(state):
    """One output of SplitMix64, and the state after it, in Python's integers."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    return _mix(state), state


def _mix(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, 1234567])
def test_draws_are_those_of_splitmix(seed):
    for sample in (0, 1, 5):
        key = sampling.keys(seed, np.array([sample]))
        state = _mix((seed + sample) & MASK)
        assert int(key[0]) == state
        for place in range(4):
            number, state = splitmix(state)
            assert sampling.uniforms(key, np.array([place]))[0] == (number >> 11) / 2**53


def test_the_first_output_is_the_published_one():
    """Of SplitMix64 with state 0, as its author's C code prints it."""
    assert splitmix(0)[0] == 0xE220A8397B1DCDAF


def logits(rows, words, scale=4.0):
    return (torch.randn(rows, words) * scale).numpy()


def choose(values, draws, top_k=0, top_p=1.0):
    count = len(values)
    options = np.full(count, top_k), np.full(count, top_p)
    return sampling.choose(values, values.max(1), np.asarray(draws, dtype=np.float64), *options)


@pytest.mark.parametrize("words", [5, 320, 3000])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.8), (0, 0.05), (50, 0.9), (1, 1.0), (0, 0.9999)]
)
def test_what_can_be_chosen_is_what_transformers_keeps(words, top_k, top_p):
    """By many draws of each row: only tokens that its filters keep, and each of those that is not very unlikely, as
    often as its probability says."""
    many = 4000
    values = logits(3, words)
    kept = torch.from_numpy(values)
    if top_k > 0:
        kept = TopKLogitsWarper(top_k)(None, kept)
    if top_p < 1:
        kept = TopPLogitsWarper(top_p)(None, kept)
    probability = torch.softmax(kept.double(), -1).numpy()
    draws = (np.arange(many) + 0.5) / many
    for row in range(3):
        chosen = choose(np.repeat(values[row : row + 1], many, 0), draws, top_k, top_p)
        share = np.bincount(chosen, minlength=words) / many
        assert (np.abs(share - probability[row]) <= 1.5 / many + 1e-6).all()
        assert set(np.nonzero(share)[0]) <= set(np.nonzero(probability[row])[0])


def test_equal_logits_are_taken_in_the_order_of_the_vocabulary():
    values = np.zeros((1, 2000), dtype=np.float32)
    assert choose(values, [0.999], top_p=0.001)[0] == 1  # the first two are 0.001
    assert choose(values, [0.999], top_p=0.8)[0] in (1597, 1598, 1599)
    assert choose(values, [0.0])[0] == 0
    assert choose(values, [1 - 2**-53])[0] == 1999


def test_extremes():
    values = np.full((3, 40), -np.inf, dtype=np.float32)
    values[0, 3] = 5.0
    values[1, [2, 39]] = -3e38
    values[2] = np.linspace(-1e4, 1e4, 40)
    for draw in (0.0, 0.3, 1 - 2**-53):
        chosen = choose(values, [draw] * 3)
        assert chosen[0] == 3
        assert chosen[1] == (2 if draw < 0.5 else 39)
        assert chosen[2] == 39


@pytest.mark.parametrize("words", [33, 320, 1500])
def test_a_row_does_not_depend_on_its_batch(words):
    values, draws = logits(50, words), torch.rand(50, dtype=torch.float64).numpy()
    top_k = torch.randint(0, 30, (50,)).numpy()
    top_p = np.where(torch.rand(50).numpy() < 0.5, 1.0, torch.rand(50, dtype=torch.float64).numpy() * 0.99 + 0.01)
    whole = np.exp(values - values.max(1)[:, None])
    together = sampling.choose(values, values.max(1), draws, top_k, top_p)
    for row in range(50):
        one = slice(row, row + 1)
        alone = np.ascontiguousarray(values[one])
        assert np.array_equal(np.exp(alone - alone.max(1)[:, None]), whole[one])
        found = sampling.choose(alone, alone.max(1), draws[one], top_k[one], top_p[one])
        assert found[0] == together[row]


def slab(tokens):
    text = Config.preset("2b").text
    with torch.device("meta"):
        return Slab(text, tokens, torch.bfloat16, torch.device("meta"))


def test_runs_of_the_slab_never_overlap_and_nothing_is_lost():
    random = np.random.default_rng(int(torch.randint(2**31, ())))
    made, taken = slab(500), {}
    refused = 0
    for _ in range(600):
        if taken and random.random() < 0.5:
            first = int(random.choice(list(taken)))
            made.give_back(first, taken.pop(first))
        else:
            sizes = random.integers(1, 60, size=random.integers(1, 5)).tolist()
            before, found = made.free_tokens, made.take(sizes)
            if found is None:
                refused += 1
                assert made.free_tokens == before
                continue
            taken |= dict(zip(found, sizes, strict=True))
        used = np.zeros(500, dtype=int)
        for first, size in taken.items():
            used[first : first + size] += 1
        assert used.max(initial=0) <= 1
        assert made.free_tokens == 500 - used.sum()
    assert refused
    for first, size in taken.items():
        made.give_back(first, size)
    assert made.take([500]) == [0]


def test_what_is_gathered_is_each_prompt_and_then_the_samples_own():
    offsets, lengths = np.array([3, 10, 12]), np.array([4, 2, 5])
    first, count = np.array([20, 20, 30]), np.array([2, 2, 1])
    tokens, ends = cache.gathered(offsets, lengths, first, count)
    assert tokens.tolist() == [20, 21, 3, 4, 5, 6, 20, 21, 10, 11, 30, 12, 13, 14, 15, 16]
    assert ends.tolist() == [0, 6, 10, 16]

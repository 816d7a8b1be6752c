"""What a step of decoding is made of besides the operators: the draw of tokens, and arguments that do not fit."""

from __future__ import annotations

import pytest
import torch

from m4ov_kernels import _C
from m4ov_kernels.decoding.native import LAYER, DecodeStep, choose_tokens


def logits(words, count, scale=4.0):
    """A state in each column, and the largest of each."""
    values = torch.randn(words, count) * scale
    return values, values.amax(0)


@pytest.mark.parametrize("words", [5, 320, 3000])
def test_tokens_come_as_often_as_their_probabilities_say(isa, words):
    many = 4000
    values, largest = logits(words, 3)
    draws = (torch.arange(many, dtype=torch.float64) + 0.5) / many
    for state in range(3):
        column = torch.full((many,), state)
        chosen = choose_tokens(values, column, largest[column], draws)
        share = torch.bincount(chosen, minlength=words) / many
        assert (share - values[:, state].double().softmax(0)).abs().max() <= 1.5 / many + 1e-6
        assert (chosen.diff() >= 0).all()  # in the order of the vocabulary


@pytest.mark.parametrize("words", [33, 320])
def test_a_rows_token_does_not_depend_on_others(isa, words):
    """Columns one after the other, in any order and again and again; any number of threads."""
    values, largest = logits(words, 64)
    threads = torch.get_num_threads()
    for column in (torch.arange(64), torch.arange(3, 40), torch.randint(64, (50,))):
        draws = torch.rand(len(column), dtype=torch.float64)
        whole = choose_tokens(values, column, largest[column], draws)
        single = [
            choose_tokens(values, column[i : i + 1], largest[column[i : i + 1]], draws[i : i + 1])
            for i in range(len(column))
        ]
        assert torch.equal(whole, torch.cat(single))
        torch.set_num_threads(3)
        assert torch.equal(whole, choose_tokens(values, column, largest[column], draws))
        torch.set_num_threads(threads)
    assert choose_tokens(values, column[:0], largest[:0], draws[:0]).shape == (0,)


def test_extremes_and_what_is_not_finite(isa):
    values = torch.full((40, 5), -torch.inf)
    values[3, 0] = 5.0
    values[[2, 39], 1] = -3e38
    values[:, 2] = torch.linspace(-1e4, 1e4, 40)
    values[:, 3] = torch.nan
    values[7, 4] = torch.inf
    for draw in (0.0, 0.3, 1 - 2**-53):
        largest = values.amax(0)
        chosen = choose_tokens(values, torch.arange(5), largest, torch.full((5,), draw, dtype=torch.float64))
        assert chosen[:3].tolist() == [3, 2 if draw < 0.5 else 39, 39]
        assert ((chosen >= 0) & (chosen < 40)).all()


def test_a_steps_tensors_are_checked():
    assert len(LAYER) == _C.decode_layer_pointers
    width, heads, kv_heads, dim, inner = 24, 4, 2, 8, 40
    sizes = {"q": 32, "k": 16, "v": 16, "o": width, "gate": inner, "up": inner, "down": width}
    across = {"o": 32, "down": inner}
    layer = {name: torch.ones(size, across.get(name, width)) for name, size in sizes.items()}
    layer |= {f"{name}_bias": None for name in sizes}
    layer |= {"input_norm": torch.ones(width), "post_norm": torch.ones(width)}
    layer |= {"q_norm": torch.ones(dim), "k_norm": torch.ones(dim)}
    layer |= {"keys": torch.ones(9, kv_heads, dim), "values": torch.ones(9, kv_heads, dim)}

    def made(changes=(), heads=heads):
        options = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "theta": 1e4, "eps": 1e-6, "scale": 0.3}
        return DecodeStep([layer, {**layer, **dict(changes)}], torch.ones(11, width), torch.ones(width), **options)

    places = torch.zeros(6, 3, dtype=torch.int64)
    assert made()(places).isfinite().all()
    assert made()(places[:, :0].contiguous()).shape == (0, width)
    for name, tensor in (
        ("q", torch.ones(31, width)),
        ("down", torch.ones(inner, width).t()),
        ("up_bias", torch.ones(inner, dtype=torch.float16)),
        ("k_norm", None),
        ("keys", torch.ones(9, kv_heads, 2 * dim)[:, :, ::2]),
    ):
        with pytest.raises(ValueError, match=f"DecodeStep: {name} must be contiguous"):
            made({name: tensor}.items())
    with pytest.raises(ValueError, match="heads must be at most 8 times kv_heads"):
        made(heads=18)

"""Batch invariance of every operator, to the bit: a row (a sequence, an image) keeps its results and the gradients of
its activations in any company, at any place, on any number of threads, wherever its tensors lie in memory; parameters'
gradients, which are sums over the batch, keep theirs on any number of threads.

Calls are drawn as each operator's entry in ``operators`` declares them: every dtype, strides, values to the ends of the
formats. A row alone, a few rows and all of them in another order are called again. A GPU keeps the same where
configurations are chosen by width and dtype alone (:mod:`m4ov_kernels.configs`, whose look-up has no other argument);
here its kernels are interpreted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import m4ov_kernels
from m4ov_kernels import geglu, gelu, layer_norm, rms_norm, swiglu, varlen_attention
from m4ov_kernels.dispatch import FUNCTIONS, OPERATORS

from . import draws, strategies
from .conftest import SEED
from .draws import Draw, Seeded
from .operators import CASES, Call

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Company:
    """How the rows of an operator's batch are taken apart.

    ``tails``: of each argument and result that is made of rows, how many dimensions one row has. ``lengths``: of an
    argument or result, how many rows each unit has, if a unit is more than a row. ``rest``: the arguments that describe
    the batch, for some units of it.
    """

    tails: Mapping[str, int]
    lengths: Callable[[Arguments, str], Sequence[int] | None] = lambda arguments, name: None
    rest: Callable[[Arguments, list[int]], Arguments] = lambda arguments, units: {}

    def units(self, arguments: Arguments) -> int:
        lengths = self.lengths(arguments, "")
        if lengths is not None:
            return len(lengths)
        name = next(name for name in self.tails if isinstance(arguments.get(name), Tensor))
        return self.flat(name, arguments[name]).shape[0]

    def flat(self, name: str, tensor: Tensor) -> Tensor:
        tail = self.tails[name]
        tensor = tensor.view(torch.int8) if tensor.dtype is torch.float8_e4m3fn else tensor  # its bits
        shape = tensor.shape[tensor.ndim - tail :]
        return tensor.reshape(tensor.shape[: tensor.ndim - tail].numel(), *shape)

    def of(self, arguments: Arguments, name: str, tensor: Tensor, units: list[int]) -> Tensor:
        """The rows of these units, in their order."""
        flat, lengths = self.flat(name, tensor), self.lengths(arguments, name)
        if lengths is None:
            return flat[torch.tensor(units, dtype=torch.int64)]
        parts = flat.split(list(lengths))
        return torch.cat([flat[:0], *(parts[unit] for unit in units)])

    def some(self, call: Call, units: list[int], draw: Draw) -> Call:
        """The same call with these units only, its tensors laid out anew."""
        arguments = call.arguments

        def part(name: str, tensor: Tensor) -> Tensor:
            return draws.laid_out(self.of(arguments, name, tensor, units), draw.choice(_LAYOUTS))

        rows = {name: part(name, arguments[name]) for name in self.tails if isinstance(arguments.get(name), Tensor)}
        grads = {name: part(name, grad) for name, grad in call.grads.items()}
        return Call({**arguments, **rows, **self.rest(arguments, units)}, grads, call.wanted)


_LAYOUTS = ("contiguous", "wide rows", "offset", "transposed", "every other")


def _image_lengths(arguments: Arguments, name: str) -> Sequence[int] | None:
    grid = arguments["grid_thw"]
    return None if grid is None else grid.prod(1).tolist()


def _sequence_lengths(arguments: Arguments, name: str) -> Sequence[int]:
    bounds_k = arguments["cu_seqlens_k"]
    by_key = name in ("k", "v") and bounds_k is not None
    return (bounds_k if by_key else arguments["cu_seqlens"]).diff().tolist()


def _sequences(arguments: Arguments, units: list[int]) -> Arguments:
    found = {}
    for name in ("cu_seqlens", "cu_seqlens_k"):
        bounds = arguments[name]
        if bounds is not None:
            bounds = torch.cat((bounds[:1], bounds.diff()[units].cumsum(0).to(bounds.dtype)))
        found[name] = bounds
    return found | {"max_seqlen": None}


def _images(arguments: Arguments, units: list[int]) -> Arguments:
    grid = arguments["grid_thw"]
    return {"grid_thw": None if grid is None else grid[units], "num_patches": None}


def _rope_images(arguments: Arguments, units: list[int]) -> Arguments:
    grid = arguments["grid_thw"]
    return {"grid_thw": None if grid is None else grid[units]}


def _token_positions(arguments: Arguments, units: list[int]) -> Arguments:
    positions, tokens = arguments["position_ids"], arguments["q"].shape[:-2]
    axes = () if positions.shape == tokens else (3,)
    return {"position_ids": positions.reshape(*axes, tokens.numel())[..., units]}


def _tokens_of_rows(arguments: Arguments, units: list[int]) -> Arguments:
    """Those tokens' rows, in another order of memory."""
    order = arguments["order"][units]
    own = torch.arange(order.numel(), dtype=torch.int32).flip(0).view(order.shape)
    rows = torch.empty_like(arguments["rows"][: order.numel()])
    return {"rows": rows.index_copy(0, own.flatten().long(), arguments["rows"][order.flatten().long()]), "order": own}


def _an_expert_each(arguments: Arguments, units: list[int]) -> Arguments:
    """A row, and the expert that it had: the others of its expert are gone."""
    owner = torch.repeat_interleave(torch.arange(len(arguments["weight"])), arguments["offsets"].diff())
    weight = arguments["weight"].detach()[owner[units]] if units else arguments["weight"][:1]
    return {"weight": weight, "offsets": torch.arange(len(units) + 1) if units else torch.zeros(2, dtype=torch.int64)}


_HEADS = {"q": 2, "k": 2, "q_turned": 2, "k_turned": 2}
_NORM = Company({"hidden_states": 1, "residual": 1, "normed": 1, "total": 1})
_GATED = Company({"gate": 1, "up": 1, "activated": 1})
_LINEAR = Company({"x": 1, "residual": 1, "output": 1})
COMPANIES = {
    "rms_norm": _NORM,
    "layer_norm": _NORM,
    "swiglu": _GATED,
    "geglu": _GATED,
    "gelu": Company({"input": 1, "activated": 1}),
    "qk_norm_mrope": Company(_HEADS, rest=_token_positions),
    "vision_rope": Company(_HEADS | {"positions": 1}, _image_lengths, _rope_images),
    "varlen_attention": Company({"q": 2, "k": 2, "v": 2, "output": 2}, _sequence_lengths, _sequences),
    "interpolate_position_embeddings": Company({"hidden_states": 1, "embedded": 1}, _image_lengths, _images),
    "int4_linear": _LINEAR,
    "int8_linear": _LINEAR,
    "fp8_linear": _LINEAR,
    "route_topk": Company({"logits": 1, "weights": 1, "experts": 1}),
    "unpermute": Company({"order": 1, "weights": 1, "output": 1}, rest=_tokens_of_rows),
    "grouped_linear": Company({"rows": 1, "output": 1}, rest=_an_expert_each),
    "linear_kl": Company(
        {"hidden_states": 1, "ref_hidden_states": 1, "mask": 0, "divergence": 0},
        rest=lambda arguments, units: {"num_valid": None},
    ),
    "quantize_int8": Company({"input": 1, "codes": 1, "scales": 1}),
    "quantize_fp8": Company({"input": 1, "values": 1, "scales": 1}),
    "rms_norm_quantize": Company({"hidden_states": 1, "residual": 1, "codes": 1, "scales": 1, "total": 1}),
    "swiglu_quantize": Company({"gate": 1, "up": 1, "codes": 1, "scales": 1}),
    "linear_logprob": Company(
        {"hidden_states": 1, "targets": 0, "logprob": 0, "logsumexp": 0, "entropy": 0},
        rest=lambda arguments, units: {"num_valid": None, "invariant": True},
    ),
}
EXEMPT = {
    "mrope_positions": "makes integers, which are compared as they are in test_rope_positions.py",
    "permute": "copies rows; its gradient is unpermute's sum",
    "scatter_vision": "copies rows",
    "deepstack_add": "adds two numbers to each result",
}


def test_every_operator_says_so():
    said = {FUNCTIONS[name].name for name in COMPANIES} | EXEMPT.keys()
    assert said == OPERATORS.keys(), "say what is a row of it, or why nothing need be said"
    assert not COMPANIES.keys() & EXEMPT.keys()
    for name in COMPANIES:
        assert "Invariance:" in getattr(m4ov_kernels, name).__doc__, name


def assert_same_bits(what: str, got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape, what
    if got.element_size() == 1:
        got, expected = got.view(torch.int8), expected.view(torch.int8)
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    differ = got.contiguous().view(bits) != expected.contiguous().view(bits)
    differ &= ~(got.isnan() & expected.isnan())
    if differ.any():
        first = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {got.numel()} differ, first {first}: {got[first]!r} and "
            f"{expected[first]!r}"
        )


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def hold(name: str, draw: Draw, *, gradients: bool = True) -> None:
    """One drawn call, whole, and parts of it; ``gradients``: theirs too."""
    case, company = CASES[name], COMPANIES[name]
    call = case.call(draw)
    if case.kernel_dtype(call.arguments) is None:
        return
    if name == "linear_logprob":  # rows that are left out say nothing
        call.arguments.update(num_valid=None, top_k_logprobs=0, invariant=True)
    call.grads.pop("probability", None)  # a mean over the batch
    if call.arguments.get("granularity") == "block":  # of 128 rows, which share a scale
        call.arguments.update(granularity="group", transposed=False)
    if call.arguments.get("activation") == "auto":  # chooses by the number of rows
        call.arguments.update(activation=draw.choice(("bf16", "fp8")))
    with on_threads(draw.integer(1, 3)):
        whole = case.evaluate(call)
    count = company.units(call.arguments)
    everyone = list(range(count))
    with on_threads(draw.integer(1, 3)):
        again = case.evaluate(call)
    for result, tensor in whole.items():
        assert_same_bits(f"{result} on other threads", again[result], tensor)
    choices = [[draw.integer(0, count - 1)], _shuffled(everyone, draw)[: draw.integer(0, count)]] if count else [[]]
    for units in (*choices, _shuffled(everyone, draw)):
        with on_threads(draw.integer(1, 3)):
            found = case.evaluate(company.some(call, units, draw))
        for result, tensor in found.items():
            of = result.removeprefix("grad_")
            if of in company.tails and (gradients or of == result):
                expected = company.of(call.arguments, of, whole[result], units)
                assert_same_bits(f"{result} of {units}", company.flat(of, tensor), expected)


def _shuffled(values: list[int], draw: Draw) -> list[int]:
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(draw.integer(0, 2**32 - 1)))
    return [values[place] for place in order]


@given(data=st.data())
@settings(max_examples=8)
@pytest.mark.parametrize("name", COMPANIES)
def test_a_row_keeps_its_bits(name, isa, data):
    if FUNCTIONS[name].select(torch.device("cpu"), torch.float32) is None:
        pytest.skip("nothing but the reference serves it here")
    data.draw(strategies.drawn(lambda draw: hold(name, draw)))


# Whose gradients are PyTorch's matrix products beside the Triton kernels, whose bits on a CPU depend on the other rows.
PRODUCTS_IN_BACKWARD = ("linear_kl",)
NOT_INTERPRETED = ("varlen_attention", "linear_logprob", "int4_linear", "int8_linear", "fp8_linear")


@pytest.mark.parametrize(
    "name", [name for name in COMPANIES if "triton" in FUNCTIONS[name].backends and name not in NOT_INTERPRETED]
)
def test_a_row_keeps_its_bits_in_triton(name):
    """Interpreted, and so only a few small calls (which is slow enough for rotations)."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for where there is no GPU")
    held, index = 0, 0
    with m4ov_kernels.backend("triton"):
        while held < 2 and index < 3000:
            index += 1
            call = CASES[name].call(Seeded(SEED, index))
            small = sum(value.numel() for value in call.arguments.values() if isinstance(value, Tensor)) < 600
            if small and CASES[name].kernel_dtype(call.arguments) is not None:
                hold(name, Seeded(SEED, index), gradients=name not in PRODUCTS_IN_BACKWARD)
                held += 1
    assert held == 2


LARGE = {
    "rms_norm": lambda x, y, w: rms_norm(x, w, eps=1e-6, residual=y)[0],
    "layer_norm": lambda x, y, w: layer_norm(x, w, w, eps=1e-6, residual=y)[0],
    "swiglu": lambda x, y, w: swiglu(x, y),
    "geglu": lambda x, y, w: geglu(x, y),
    "gelu": lambda x, y, w: gelu(x, bias=w),
}


@pytest.mark.parametrize("name", LARGE)
def test_of_a_batch_larger_than_the_caches(name, isa):
    """Such outputs are written past them, by other instructions."""
    function, rows, width, dtype = LARGE[name], 2100, 4096, torch.bfloat16
    x, y, g = (torch.randn(rows, width).to(dtype) for _ in range(3))
    w = torch.randn(width).to(dtype).requires_grad_()

    def run(units: Any, threads: int) -> list[Tensor]:
        given = [x[units].clone().requires_grad_(), y[units].clone().requires_grad_(), w]
        with on_threads(threads):
            result = function(*given)
            grads = torch.autograd.grad(result, given, g[units], allow_unused=True)
        return [result.detach(), *(grad for grad in grads if grad is not None)]

    whole, threaded = run(slice(None), 1), run(slice(None), 2)
    for number, (one, two) in enumerate(zip(whole, threaded, strict=True)):
        assert_same_bits(f"tensor {number} on two threads", two, one)
    for units in (slice(7, 8), slice(1030, 1043), slice(2099, 2100)):
        for one, some in zip(whole, run(units, 2), strict=True):
            if one.ndim == 2:
                assert_same_bits(str(units), some, one[units])


@given(data=st.data())
@settings(max_examples=8)
@pytest.mark.parametrize("dtype", draws.DTYPES)
def test_decoding_chunks_and_prefilling_are_one(dtype, isa, data):
    """A sequence in one call; cut into chunks, each with the keys so far; row by row; and with others beside it."""
    data.draw(strategies.drawn(lambda draw: _decode(dtype, draw)))


def _decode(dtype: torch.dtype, draw: Draw) -> None:
    heads, kv_heads = draw.choice(((1, 1), (2, 1), (4, 2), (3, 3), (8, 1)))
    dim, length = draw.choice((8, 16, 33, 64, 72, 128)), draw.choice((1, 5, 40, 128, 129, 260, 300))
    q = draws.tensor(draw, (length, heads, dim), dtype, layout=draw.choice(_LAYOUTS))
    k, v = (draws.tensor(draw, (length, kv_heads, dim), dtype, layout=draw.choice(_LAYOUTS)) for _ in range(2))

    def attend(spans: list[tuple[int, int]]) -> list[Tensor]:
        """Of queries ``[first, last)`` with the keys up to ``last``, all spans in one packed call."""
        queries = torch.cat([q[first:last] for first, last in spans])
        keys, values = (torch.cat([x[:last] for _, last in spans]) for x in (k, v))
        bounds = torch.tensor([0, *(last - first for first, last in spans)]).cumsum(0)
        bounds_k = torch.tensor([0, *(last for _, last in spans)]).cumsum(0)
        with on_threads(draw.integer(1, 3)):
            found = varlen_attention(queries, keys, values, bounds, cu_seqlens_k=bounds_k, causal=True, invariant=True)
        return list(found.split([last - first for first, last in spans]))

    (whole,) = attend([(0, length)])
    cuts = sorted({0, length, *(draw.integer(0, length) for _ in range(3))})
    chunks = list(pairwise(cuts))
    rows = [(row, row + 1) for row in {0, length - 1, draw.integer(0, length - 1)}]
    for spans in (chunks, rows, rows[:1], [*rows, (0, length), *chunks]):
        for (first, last), found in zip(spans, attend(spans), strict=True):
            assert_same_bits(f"rows {first} to {last} of {length}", found, whole[first:last])

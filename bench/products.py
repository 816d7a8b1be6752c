"""The limit of a head: its matrix products alone, as PyTorch makes them, by chunks of the vocabulary."""

from __future__ import annotations

from functools import cache

import torch

from m4ov_bench import measure

_CHUNKS = (1024, 2048, 4096, 8192)  # of the vocabulary


def products(rows: int, width: int, vocabulary: int, dtype: torch.dtype, chunk: int, many: int) -> measure.Call:
    """The matrix products alone, preallocated: logits (``many`` = 1), or logits once (3) or twice (4) and both
    gradients."""
    input = torch.randn(rows, width).to(dtype)
    weight = torch.randn(vocabulary, width).to(dtype)
    logits = [torch.zeros(rows, min(chunk, vocabulary), dtype=dtype) for _ in range(2)]
    grad_input, grad_weight = torch.zeros_like(input), torch.zeros_like(weight)

    def call(_: int) -> None:
        for start in range(0, vocabulary, chunk):
            part = weight[start : start + chunk]
            out = logits[0][:, : part.shape[0]]
            torch.mm(input, part.t(), out=out)
            if many == 4:
                torch.mm(input, part.t(), out=logits[1][:, : part.shape[0]])
            if many > 1:
                torch.mm(out.t(), input, out=grad_weight[start : start + chunk])
                torch.mm(out, part, out=grad_input)

    return call


@cache
def fastest_chunk(rows: int, width: int, vocabulary: int, dtype: torch.dtype, quick: bool) -> int:
    """The chunk with which four products are fastest: the limit does not depend on our own choice."""
    calls = {
        str(c): products(rows, width, vocabulary, dtype, c, 4) for c in _CHUNKS if c <= max(vocabulary, _CHUNKS[0])
    }
    effort = measure.Effort(seconds=1.0 if quick else 4.0, each=1.0, fewest=2, most=4)
    times = measure.interleaved(calls, effort)
    return int(min(times, key=lambda name: times[name].seconds))

"""Samples of the mixture-of-experts operators for ``test_dispatch.py``."""

from __future__ import annotations

from typing import Any

import torch

from m4ov_kernels import grouped_linear, permute, route_topk, unpermute

EXPERTS = torch.tensor([[1, 0], [1, 3], [0, 1]], dtype=torch.int32)
ORDER = torch.tensor([[2, 0], [3, 5], [1, 4]], dtype=torch.int32)
OFFSETS = torch.tensor([0, 2, 2, 6], dtype=torch.int32)


def route_case(dtype: torch.dtype = torch.float32) -> Any:
    # Far enough apart that no rounding chooses another.
    logits = (torch.rand(6, 5).argsort(-1) + torch.rand(6, 5) * 0.5).to(dtype)

    def function(logits):
        weights, _, load = route_topk(logits, top_k=2)
        return torch.cat((weights.flatten(), load.probability))

    return function, [logits]


def permute_case(dtype: torch.dtype = torch.float32) -> Any:
    return lambda x: permute(x, EXPERTS, 4)[0], [torch.randn(3, 40, dtype=dtype)]


def unpermute_case(dtype: torch.dtype = torch.float32) -> Any:
    wide = torch.promote_types(dtype, torch.float32)
    return lambda x, w: unpermute(x, ORDER, w), [torch.randn(6, 40, dtype=dtype), torch.rand(3, 2, dtype=wide)]


def grouped_case(dtype: torch.dtype = torch.float32) -> Any:
    # Results of about 1, as those of the others.
    tensors = [torch.randn(6, 40, dtype=dtype), torch.randn(3, 24, 40, dtype=dtype) / 8]
    return lambda x, w: grouped_linear(x, w, OFFSETS), tensors


CASES = {"route_topk": route_case, "permute": permute_case, "unpermute": unpermute_case, "grouped_linear": grouped_case}

WEIGHTS, ROWS = torch.rand(3, 2), torch.randn(6, 8)
RAW = {
    "route_topk_fwd": [(torch.randn(3, 5), 2, True), (torch.randn(5, 3).bfloat16().t(), 5, False)],
    "route_topk_bwd": [
        (torch.randn(3, 4), WEIGHTS, torch.randn(4), WEIGHTS, EXPERTS, True),
        (torch.randn(4, 3).t(), None, torch.randn(4), WEIGHTS, EXPERTS, False),
    ],
    "permute_fwd": [(torch.randn(3, 8), EXPERTS, 4), (torch.randn(8, 3).bfloat16().t(), EXPERTS, 5)],
    "permute_bwd": [(ROWS, ORDER), (torch.randn(8, 6).t(), ORDER)],
    "unpermute_fwd": [(ROWS, ORDER, WEIGHTS), (ROWS.bfloat16(), ORDER, None)],
    "unpermute_bwd": [
        (torch.randn(3, 8), ROWS, ORDER, WEIGHTS, True, True),
        (torch.randn(8, 3).t(), None, ORDER, None, True, False),
        (torch.randn(3, 8), ROWS, ORDER, WEIGHTS, False, True),
    ],
    "grouped_linear_fwd": [
        (ROWS, torch.randn(3, 5, 8), OFFSETS),
        (ROWS.bfloat16(), torch.randn(3, 8, 5).bfloat16().mT, OFFSETS.long()),
    ],
    "grouped_linear_bwd": [
        (torch.randn(6, 5), ROWS, torch.randn(3, 5, 8), OFFSETS, True, True),
        (torch.randn(6, 5), ROWS, torch.randn(3, 5, 8), OFFSETS, False, True),
        (torch.randn(6, 5), ROWS, torch.randn(3, 8, 5).mT, OFFSETS, True, False),
    ],
}

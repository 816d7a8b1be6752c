"""Cases of attention inside sequences."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import varlen_attention

from .. import draws
from ..draws import Draw
from ..numerics import EPS
from . import corruptions
from .case import Call, OperatorCase
from .options import number, tensor_dtype

# Scores of large values make a softmax of one term, whose place bf16's rounding chooses: judged in test_attention.py.
# Products of denormal values, in bf16, are zeros to the processor.
_VALUES = ("normal", "small", "equal", "zeros")


def _arguments(draw: Draw) -> dict[str, Any]:
    dtype, kind = tensor_dtype(draw), draws.kinds(draw, _VALUES)
    heads, kv_heads = draw.choice(((1, 1), (2, 1), (4, 2), (3, 3), (6, 2)))
    dim = draw.choice((1, 2, 7, 8, 16, 32, 33, 64, 72)) if not draw.one_in(16) else draw.choice((80, 96, 128, 130))
    sizes = [_length(draw) for _ in range(draw.integer(1, 4))]
    sizes_k = [_length(draw) for _ in sizes] if draw.one_in(4) else None
    tokens, keys = sum(sizes), sum(sizes if sizes_k is None else sizes_k)
    bounds_dtype = draw.choice((torch.int32, torch.int64))
    return {
        "q": draws.tensor(draw, (tokens, heads, dim), dtype, kind()),
        "k": draws.tensor(draw, (keys, kv_heads, dim), dtype, kind()),
        "v": draws.tensor(draw, (keys, kv_heads, dim), dtype, kind()),
        "cu_seqlens": _bounds(sizes, bounds_dtype),
        "cu_seqlens_k": None if sizes_k is None else _bounds(sizes_k, bounds_dtype),
        "causal": draw.boolean(),
        "max_seqlen": draw.choice((None, max(sizes))),
        "scale": draw.choice((None, None, 0.3, 1)),
    }


def _length(draw: Draw) -> int:
    if draw.one_in(64):
        return draw.choice((129, 200, 540))
    return draw.integer(0, 9) if not draw.one_in(6) else draw.choice((31, 64, 65))


def _bounds(sizes: list[int], dtype: torch.dtype) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(dtype)


def _results(q: Tensor, **_: Any) -> Any:
    return {"output": (q.shape, q.dtype)}


def sums_of_absolutes(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, sizes: list[int], sizes_k: list[int], causal: bool, scale: float
) -> list[Tensor]:
    """What output and gradients are sums and differences of: the same sums over absolute values, in float64."""
    results: list[list[Tensor]] = [[x.double()[:0]] for x in (q, q, k, k)]
    group = q.shape[1] // k.shape[1]
    parts = (x.double() for x in (q, grad))
    for rows, g, keys, values in zip(
        *(x.split(sizes) for x in parts), *(x.double().split(sizes_k) for x in (k, v)), strict=True
    ):
        rows, g = rows.transpose(0, 1), g.transpose(0, 1)
        keys, values = (x.transpose(0, 1).repeat_interleave(group, dim=0) for x in (keys, values))
        visible = torch.ones(rows.shape[1], keys.shape[1], dtype=torch.bool)
        visible = visible.tril(keys.shape[1] - rows.shape[1]) if causal else visible
        p = (rows @ keys.mT * scale).masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
        a = g.abs() @ values.abs().mT
        a = p * (a + (p * a).sum(-1, keepdim=True)) * scale
        shared = [x.unflatten(0, (-1, group)).sum(1) for x in (a.mT @ rows.abs(), p.mT @ g.abs())]
        for result, term in zip(results, [p @ values.abs(), a @ keys.abs(), *shared], strict=True):
            result.append(term.transpose(0, 1))
    return [torch.cat(result) for result in results]


def _terms(call: Call) -> dict[str, Tensor]:
    arguments = call.arguments
    q, k, v = (arguments[name].detach() for name in ("q", "k", "v"))
    sizes = arguments["cu_seqlens"].diff().tolist()
    sizes_k = sizes if arguments["cu_seqlens_k"] is None else arguments["cu_seqlens_k"].diff().tolist()
    scale = q.shape[2] ** -0.5 if arguments["scale"] is None else float(arguments["scale"])
    grad = call.grads.get("output", torch.zeros_like(q))
    grad = grad.double().nan_to_num(0.0, 0.0, 0.0)
    made = sums_of_absolutes(q, k, v, grad, sizes, sizes_k, arguments["causal"], scale)
    # Probabilities and the gradients of scores are rounded to the dtype, and so cannot be smaller than its smallest.
    least = torch.finfo(q.dtype).smallest_normal * max(1, q.shape[0], k.shape[0])
    if q.dtype is torch.bfloat16:  # VDPBF16PS takes what is below the normal range for 0, and gives 0 for it
        least /= EPS[q.dtype]
    return {name: term + least for name, term in zip(("output", "grad_q", "grad_k", "grad_v"), made, strict=True)}


def _other_heads(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str]:
    heads, k = arguments["q"].shape[1], arguments["k"]
    wrong = k.new_zeros(k.shape[0], heads + 1, k.shape[2])
    return {"k": wrong}, str(list(wrong.shape))


VARLEN_ATTENTION = OperatorCase(
    "varlen_attention",
    varlen_attention,
    _arguments,
    _results,
    ("q", "k", "v"),
    (
        *corruptions.float_tensor("q"),
        corruptions.shape("q", corruptions.deeper, corruptions.scalar, lambda shape: (shape[0], 0, shape[2])),
        *corruptions.float_tensor("k"),
        corruptions.float_dtype("k"),
        corruptions.shape("k", corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.Corruption("k", "heads that do not divide", ValueError, _other_heads),
        corruptions.device("k"),
        *corruptions.float_tensor("v"),
        corruptions.float_dtype("v"),
        corruptions.shape("v", corruptions.wider, corruptions.deeper, corruptions.longer),
        corruptions.device("v"),
        *corruptions.bounds("cu_seqlens"),
        corruptions.device("cu_seqlens"),
        corruptions.shape("cu_seqlens", corruptions.deeper, lambda shape: (0,)),
        corruptions.value("cu_seqlens", TypeError, "not a tensor", [0, 1], None, 3),
        *corruptions.bounds("cu_seqlens_k"),
        corruptions.value("max_seqlen", ValueError, "negative", -1),
        corruptions.value("max_seqlen", TypeError, "not an int", 1.5, "3", True),
        corruptions.value("scale", ValueError, "not above 0", 0.0, -1.0, math.nan, math.inf),
        number("scale"),
    ),
    _terms,
    share=1,
    # A NaN in a row's gradient reaches hidden keys in plain PyTorch (0 · NaN), and in ours those of the same block.
    gradient_values=_VALUES,
)

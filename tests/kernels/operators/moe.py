"""Cases of the mixture-of-experts operators."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import grouped_linear, permute, route_topk, unpermute
from m4ov_kernels.dispatch import KERNEL_DTYPES

from .. import draws
from ..draws import Draw
from ..numerics import BEYOND, EPS
from . import corruptions
from .case import Call, OperatorCase
from .corruptions import Corruption
from .options import tensor_dtype

SINGLE, TINY = EPS[torch.float32], torch.finfo(torch.float32).smallest_normal
# A gradient of a chosen expert that is not finite reaches every expert in plain PyTorch, and in ours the chosen.
FINITE = tuple(kind for kind in draws.GRADIENT_VALUES if kind != "nonfinite")
# Of products: what formats end with stands in test_moe.py, because bf16's products take denormal numbers for 0.
PRODUCTS = ("normal", "small", "large", "equal", "zeros", "denormal")


def _counts(draw: Draw, some: tuple[int, ...] = (16, 17, 63, 65, 130, 200)) -> int:
    return draw.integer(0, 9) if not draw.one_in(6) else draw.choice(some)


def _width(draw: Draw) -> int:
    return draw.integer(1, 80) if not draw.one_in(8) else draw.choice((127, 128, 129, 257, 513, 1030))


def route(logits: Tensor, top_k: int, normalize: bool = True) -> tuple[Tensor, ...]:
    """:func:`m4ov_kernels.route_topk`, flat."""
    weights, experts, load = route_topk(logits, top_k=top_k, normalize=normalize)
    return weights, experts, *load


def _routed(draw: Draw) -> dict[str, Any]:
    experts = draw.integer(1, 20) if not draw.one_in(8) else draw.choice((60, 64, 128, 129, 300))
    dtype, kind = tensor_dtype(draw), draws.kinds(draw)
    return {
        "logits": draws.tensor(draw, (_counts(draw), experts), dtype, kind(), scale=draw.choice((1.0, 1.0, 8.0))),
        "top_k": draw.integer(1, min(experts, 10)) if not draw.one_in(16) else experts,
        "normalize": not draw.one_in(3),
    }


def _route_results(logits: Tensor, top_k: int, **_: Any) -> Any:
    (tokens, experts), wide = logits.shape, torch.promote_types(logits.dtype, torch.float32)
    return {
        "weights": ((tokens, top_k), wide),
        "experts": ((tokens, top_k), torch.int32),
        "counts": ((experts,), torch.int64),
        "probability": ((experts,), wide),
    }


def _route_terms(call: Call) -> dict[str, Tensor]:
    """Of weights and mean probability: themselves, as each is an exponential over a sum of such. Of the gradient:
    p · (|g| + Σ p |g|), and the same of the chosen among themselves."""
    logits, normalize = call.arguments["logits"].detach().double(), call.arguments["normalize"]
    p = logits.softmax(-1).nan_to_num(0.0)
    chosen = logits.sort(descending=True, stable=True).indices[:, : call.arguments["top_k"]]
    weights = p.gather(1, chosen)
    weights = weights / weights.sum(-1, keepdim=True) if normalize else weights
    terms = {"weights": weights, "probability": p.sum(0) / max(len(p), 1)}
    if not call.wanted:
        return terms
    slopes = torch.zeros_like(p)
    if "probability" in call.grads:
        slopes += call.grads["probability"].double().abs() / max(len(p), 1)
    among = torch.zeros_like(p)
    if "weights" in call.grads:
        grads = call.grads["weights"].double().abs()
        if normalize:
            among.scatter_(1, chosen, weights * (grads + (weights * grads).sum(-1, keepdim=True)))
        else:
            slopes.scatter_add_(1, chosen, grads)
    terms["grad_logits"] = p * (slopes + (p * slopes).sum(-1, keepdim=True)) + among
    return terms


ROUTE_TOPK = OperatorCase(
    "route_topk",
    route,
    _routed,
    _route_results,
    ("logits",),
    (
        *corruptions.float_tensor("logits"),
        corruptions.shape("logits", corruptions.deeper, corruptions.scalar, lambda shape: (shape[0], 0)),
        corruptions.value("top_k", TypeError, "not an int", 2.0, "2", True, None),
        corruptions.value("top_k", ValueError, "out of range", 0, -1, 10**6),
        corruptions.value("normalize", TypeError, "not a bool", 1, None, "yes"),
    ),
    _route_terms,
    gradient_values=FINITE,
)


def _permuted(draw: Draw) -> dict[str, Any]:
    tokens, top_k, experts = _counts(draw), draw.integer(1, 4), draw.choice((1, 2, 5, 8, 60))
    dtype, kind = tensor_dtype(draw), draws.kinds(draw)
    chosen = [[draw.integer(0, experts - 1) for _ in range(top_k)] for _ in range(tokens)]
    layout = draw.choice(("contiguous", "transposed", "every other"))
    return {
        "hidden_states": draws.tensor(draw, (tokens, _width(draw)), dtype, kind()),
        "experts": draws.laid_out(torch.tensor(chosen, dtype=torch.int32).view(tokens, top_k), layout),
        "num_experts": experts,
    }


def _permute_results(hidden_states: Tensor, experts: Tensor, num_experts: int) -> Any:
    return {
        "rows": ((experts.numel(), hidden_states.shape[1]), hidden_states.dtype),
        "order": (experts.shape, torch.int32),
        "offsets": ((num_experts + 1,), torch.int32),
    }


def _permute_terms(call: Call) -> dict[str, Tensor]:
    """Of the gradient: the absolute values of what is summed."""
    if "rows" not in call.grads:
        return {}
    experts = call.arguments["experts"]
    slots = experts.flatten().sort(stable=True).indices
    grads = call.grads["rows"].double().abs()[slots.argsort()]
    return {"grad_hidden_states": grads.view(*experts.shape, grads.shape[1]).sum(1)}


def _another_expert(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
    wrong = arguments["experts"].clone(memory_format=torch.contiguous_format)
    if not wrong.numel():
        return None
    value = draw.choice((arguments["num_experts"], -1, -(2**31), 2**31 - 1))
    wrong.view(-1)[draw.integer(0, wrong.numel() - 1)] = value
    return {"experts": wrong}, str(value)


PERMUTE = OperatorCase(
    "permute",
    permute,
    _permuted,
    _permute_results,
    ("hidden_states",),
    (
        *corruptions.float_tensor("hidden_states"),
        corruptions.shape("hidden_states", corruptions.deeper, corruptions.scalar, lambda shape: (shape[0], 0)),
        corruptions.shape("hidden_states", corruptions.longer, blamed="experts"),
        *corruptions.int32_tensor("experts"),
        corruptions.shape("experts", corruptions.longer, corruptions.deeper, lambda shape: (shape[0], 0)),
        corruptions.device("experts"),
        Corruption("experts", "out of range", ValueError, _another_expert),
        corruptions.value("num_experts", TypeError, "not an int", 2.0, "2", True, None),
        corruptions.value("num_experts", ValueError, "not positive", 0, -3),
    ),
    _permute_terms,
)


@dataclass(frozen=True)
class WeightedCase(OperatorCase):
    """The weights of 16-bit rows are float32."""

    def __repr__(self) -> str:
        return self.name

    def kernel_dtype(self, arguments: Mapping[str, Any]) -> torch.dtype | None:
        dtype: torch.dtype = arguments["rows"].dtype
        return dtype if dtype in KERNEL_DTYPES else None


def _unpermuted(draw: Draw) -> dict[str, Any]:
    tokens, top_k = _counts(draw), draw.integer(1, 4)
    dtype, kind = tensor_dtype(draw), draws.kinds(draw)
    order = torch.randperm(tokens * top_k, generator=torch.Generator().manual_seed(draw.integer(0, 2**32 - 1)))
    wide = torch.promote_types(dtype, torch.float32)
    layout = draw.choice(("contiguous", "transposed", "every other"))
    return {
        "rows": draws.tensor(draw, (tokens * top_k, _width(draw)), dtype, kind()),
        "order": draws.laid_out(order.to(torch.int32).view(tokens, top_k), layout),
        "weights": draws.tensor(draw, (tokens, top_k), wide, kind()) if not draw.one_in(3) else None,
    }


def _unpermute_results(rows: Tensor, order: Tensor, **_: Any) -> Any:
    return {"output": ((order.shape[0], rows.shape[1]), rows.dtype)}


def _unpermute_terms(call: Call) -> dict[str, Tensor]:
    """The absolute values of what is summed."""
    rows, order, weights = (call.arguments[name] for name in ("rows", "order", "weights"))
    taken = rows.detach().double().abs()[order.flatten().long()].view(*order.shape, rows.shape[1])
    factors = torch.ones(order.shape, dtype=torch.float64) if weights is None else weights.detach().double().abs()
    found = {"output": (taken * factors[..., None]).sum(1)}
    if "output" in call.grads:
        grads = call.grads["output"].double().abs()
        # float32 sums of many products: the size of their partial sums, and how far those walk
        walk = 1 + math.sqrt(rows.shape[1]) / 8
        found["grad_weights"] = (taken.square() * grads.square()[:, None]).sum(-1).sqrt() * walk
        past = (taken * grads[:, None]).sum(-1) > torch.finfo(torch.float32).max / 16
        found["grad_weights"] = torch.where(past, BEYOND, found["grad_weights"])
    return found


def _another_row(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
    wrong = arguments["order"].clone(memory_format=torch.contiguous_format)
    if not wrong.numel():
        return None
    value = draw.choice((wrong.numel(), -1, -(2**31), 2**31 - 1))
    wrong.view(-1)[draw.integer(0, wrong.numel() - 1)] = value
    return {"order": wrong}, str(value)


def _row_twice(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
    wrong = arguments["order"].clone(memory_format=torch.contiguous_format)
    if wrong.numel() < 2:
        return None
    first = draw.integer(0, wrong.numel() - 2)
    wrong.view(-1)[first + 1] = wrong.view(-1)[first]
    return {"order": wrong}, str(int(wrong.view(-1)[first]))


UNPERMUTE = WeightedCase(
    "unpermute",
    unpermute,
    _unpermuted,
    _unpermute_results,
    ("rows", "weights"),
    (
        *corruptions.float_tensor("rows"),
        corruptions.shape("rows", corruptions.deeper, corruptions.scalar, lambda shape: (shape[0], 0)),
        corruptions.shape("rows", corruptions.longer, blamed="order"),
        *corruptions.int32_tensor("order"),
        corruptions.shape("order", corruptions.longer, corruptions.deeper, corruptions.scalar),
        corruptions.device("order"),
        Corruption("order", "no row", ValueError, _another_row),
        Corruption("order", "a row twice", ValueError, _row_twice),
        *corruptions.float_tensor("weights", optional=True),
        corruptions.dtype("weights", torch.bfloat16, torch.float16),
        corruptions.shape("weights", corruptions.longer, corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.device("weights"),
    ),
    _unpermute_terms,
    gradient_values=FINITE,
)


def _grouped(draw: Draw) -> dict[str, Any]:
    experts = draw.choice((1, 2, 3, 7))
    sizes = [0 if draw.one_in(4) else _counts(draw, (16, 17, 49, 65, 130, 300)) for _ in range(experts)]
    if draw.one_in(4):  # all rows are one expert's
        sizes = [sum(sizes) if expert == experts // 2 else 0 for expert in range(experts)]
    dtype, kind = tensor_dtype(draw), draws.kinds(draw, PRODUCTS)
    if draw.one_in(64):
        columns, width = draw.choice(((97, 1100), (257, 130), (200, 600)))
    else:
        columns, width = draw.integer(1, 80), draw.integer(1, 80)
    if draw.boolean():
        weight = draws.tensor(draw, (experts, columns, width), dtype, kind())
    else:
        weight = draws.tensor(draw, (experts, width, columns), dtype, kind()).mT
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(draw.choice((torch.int32, torch.int64)))
    return {
        "rows": draws.tensor(draw, (sum(sizes), width), dtype, kind()),
        "weight": weight,
        "offsets": draws.laid_out(offsets, draw.choice(("contiguous", "every other"))),
    }


def _grouped_results(rows: Tensor, weight: Tensor, **_: Any) -> Any:
    return {"output": ((rows.shape[0], weight.shape[1]), rows.dtype)}


def _sum_terms(x: Tensor, y: Tensor) -> Tensor:
    """Of the product ``x @ yᵀ``: how far float32 sums may be off, as terms of which the judge's share is so large:
    roundings of partial sums, whose size is the root of the sum of the squared products, and what bf16's products take
    for 0."""
    dtype, width = x.dtype, x.shape[-1]
    x, y = x.double().abs(), y.double().abs()
    walk = 1 + math.sqrt(width) / 8
    bound = 4 * SINGLE * walk * (x.square() @ y.square().mT).sqrt()
    bound = bound + TINY * (width + x.sum(-1)[..., None] + y.sum(-1)[..., None, :])
    past = x @ y.mT > torch.finfo(torch.float32).max / 16
    return torch.where(past, BEYOND, bound / (EPS[dtype] + 4 * SINGLE))


def _grouped_terms(call: Call) -> dict[str, Tensor]:
    rows, weight, offsets = (call.arguments[name].detach() for name in ("rows", "weight", "offsets"))
    sizes = offsets.diff().tolist()
    parts = list(zip(rows.split(sizes), weight.unbind(), strict=True))
    found = {"output": torch.cat([_sum_terms(x, w) for x, w in parts])}
    if "output" in call.grads:
        grads = call.grads["output"].split(sizes)
        found["grad_rows"] = torch.cat([_sum_terms(g, w.mT) for g, (_, w) in zip(grads, parts, strict=True)])
        found["grad_weight"] = torch.stack([_sum_terms(g.mT, x.mT) for g, (x, _) in zip(grads, parts, strict=True)])
    return found


GROUPED_LINEAR = OperatorCase(
    "grouped_linear",
    grouped_linear,
    _grouped,
    _grouped_results,
    ("rows", "weight"),
    (
        *corruptions.float_tensor("rows"),
        corruptions.shape("rows", corruptions.deeper, corruptions.scalar, lambda shape: (shape[0], 0)),
        corruptions.shape("rows", corruptions.wider, blamed="weight"),
        corruptions.shape("rows", corruptions.longer, blamed="offsets"),
        *corruptions.float_tensor("weight"),
        corruptions.float_dtype("weight"),
        corruptions.shape("weight", corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.shape("weight", lambda shape: (0, *shape[1:]), lambda shape: (shape[0], 0, shape[2])),
        corruptions.shape("weight", corruptions.longer, blamed="offsets"),
        corruptions.device("weight"),
        *corruptions.bounds("offsets"),
        corruptions.shape("offsets", corruptions.longer, corruptions.deeper, corruptions.scalar),
        corruptions.value("offsets", TypeError, "not a tensor", [0, 1], None, 3),
        corruptions.device("offsets"),
    ),
    _grouped_terms,
    gradient_values=("normal", "small", "large", "equal", "zeros", "denormal"),
    share=2,
)

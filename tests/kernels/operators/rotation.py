"""Cases of the rotary embeddings: of text, with the norms before it, and of image patches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import qk_norm_mrope, vision_rope

from .. import draws
from ..draws import Draw
from ..numerics import BEYOND
from . import corruptions
from .case import Call, OperatorCase
from .options import NUMERICS, nonnegative, number, tensor_dtype

_INTEGERS = (torch.int64, torch.int32)
_SPACED = ("contiguous", "wide rows", "offset", "transposed", "every other")  # layouts that keep every value


def _tokens(draw: Draw) -> tuple[int, ...]:
    if draw.one_in(64):
        return draw.choice(((70,), (33, 3)))
    if not draw.one_in(3):
        return (draw.integer(0, 6),)
    return draw.choice(((), (1, 3), (2, 2), (2, 1, 2), (0, 3)))


def _positions(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(draw.integer(0, 2**32 - 1))
    end = draw.choice((1, 100, 40000, 2**24, 2**31 - 1))
    values = torch.randint(-1 if draw.one_in(8) else 0, end, shape, generator=generator).to(draw.choice(_INTEGERS))
    return draws.laid_out(values, draws.layout_of(draw)) if shape else values


def _arguments(draw: Draw) -> dict[str, Any]:
    dtype, kind = tensor_dtype(draw), draws.kinds(draw)
    tokens = _tokens(draw)
    dim = (
        draw.choice((2, 4, 7, 8, 16, 20, 40, 64, 72, 128)) if not draw.one_in(16) else draw.choice((96, 130, 256, 1024))
    )
    heads, kv_heads = draw.choice(((1, 1), (2, 1), (4, 2), (3, 3), (17, 2)))
    rotary_dim = dim if not dim % 2 and not draw.one_in(4) else 2 * draw.integer(1, dim // 2)
    half = rotary_dim // 2
    first = draw.integer(0, half)
    second = draw.integer(0, half - first)
    one_axis = draw.one_in(4)
    with_section = not one_axis or draw.boolean()
    return {
        "q": draws.tensor(draw, (*tokens, heads, dim), dtype, kind()),
        "k": draws.tensor(draw, (*tokens, kv_heads, dim), dtype, kind()),
        "q_weight": draws.tensor(draw, (dim,), dtype, kind()) if not draw.one_in(4) else None,
        "k_weight": draws.tensor(draw, (dim,), dtype, kind()) if not draw.one_in(4) else None,
        "position_ids": _positions(draw, tokens if one_axis else (3, *tokens)),
        "mrope_section": [first, second, half - first - second] if with_section else None,
        "theta": draw.choice((10000.0, 5e6, 1e6, 500)),
        "eps": draw.choice((1e-6, 1e-5, 0.5, 1)),
        "interleaved": draw.boolean(),
        "rotary_dim": rotary_dim if rotary_dim != dim or draw.boolean() else None,
        "numerics": draw.choice(draws.NUMERICS),
    }


def _results(q: Tensor, k: Tensor, **_: Any) -> Any:
    return {"q_turned": (q.shape, q.dtype), "k_turned": (k.shape, k.dtype)}


def _turned(x: Tensor, width: int) -> Tensor:
    """The two terms of each element of a rotation, absolute and at most."""
    half, whole = width // 2, x.abs()
    pair = whole[..., :half] + whole[..., half:width]
    return torch.cat((pair, pair, whole[..., width:]), -1)


def _terms(call: Call) -> dict[str, Tensor]:
    arguments, terms = call.arguments, {}
    width = arguments["rotary_dim"] or arguments["q"].shape[-1]
    for name in ("q", "k"):
        x, weight = arguments[name].double(), arguments[f"{name}_weight"]
        least = torch.finfo(arguments[name].dtype).smallest_normal
        normed, scale = x, 1.0
        if weight is not None:
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + arguments["eps"])
            normed = x * scale
        terms[f"{name}_turned"] = _turned(normed if weight is None else normed * weight.double(), width) + least
        if not call.wanted:
            continue
        grad = call.grads.get(f"{name}_turned", torch.zeros_like(arguments[name])).double().nan_to_num(0.0, 0.0, 0.0)
        turned = _turned(grad, width)
        if weight is None:
            terms[f"grad_{name}"] = turned + least
            continue
        weighted = turned * weight.double().abs()
        second = normed.abs() * (weighted * normed.abs()).mean(-1, keepdim=True)
        # With an infinite sum of squares the factor is 0, and 0 times another infinite sum NaN.
        dots = (weighted * x.abs()).sum(-1, keepdim=True)
        sums = torch.maximum(x.square().sum(-1, keepdim=True), torch.maximum(dots, dots * scale))
        to_x = (weighted + 3 * second) * scale + least
        terms[f"grad_{name}"] = torch.where(sums > 0.9 * torch.finfo(torch.float32).max, BEYOND, to_x)
        terms[f"grad_{name}_weight"] = (turned * normed.abs()).flatten(0, -2).sum(0) + least
    return terms


def _other_tokens(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str]:
    positions = arguments["position_ids"]
    wrong = positions.new_zeros((*positions.shape, 2))
    return {"position_ids": wrong}, str(list(wrong.shape))


def _wrong_sum(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
    if arguments["mrope_section"] is None:
        return None
    wrong = list(arguments["mrope_section"])
    wrong[draw.integer(0, 2)] += 1
    return {"mrope_section": wrong}, repr(wrong)


def _needs_sections(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
    positions = arguments["position_ids"]
    if positions.ndim != arguments["q"].ndim - 1:
        return None
    return {"mrope_section": None}, str(list(positions.shape))


def _heads() -> tuple[corruptions.Corruption, ...]:
    return (
        *corruptions.float_tensor("q"),
        corruptions.shape("q", corruptions.scalar, lambda shape: (*shape[:-1], 0), lambda shape: (*shape[:-2], 0, 4)),
        corruptions.shape("q", corruptions.deeper, blamed="k"),
        *corruptions.float_tensor("k"),
        corruptions.float_dtype("k"),
        corruptions.shape("k", corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.device("k"),
    )


def _integers(argument: str, optional: bool = False) -> tuple[corruptions.Corruption, ...]:
    values = [[1], 1.0, "tensor"] + ([] if optional else [None])
    return (
        corruptions.value(argument, TypeError, "not a tensor", *values),
        corruptions.dtype(argument, torch.float32, torch.int16, torch.bool),
        corruptions.device(argument),
    )


_BASE = (
    corruptions.value("theta", ValueError, "not above 0", 0.0, -1.0, math.nan, math.inf),
    number("theta"),
    NUMERICS,
)

QK_NORM_MROPE = OperatorCase(
    "qk_norm_mrope",
    qk_norm_mrope,
    _arguments,
    _results,
    ("q", "k", "q_weight", "k_weight"),
    (
        *_heads(),
        *corruptions.float_tensor("q_weight", optional=True),
        corruptions.shape("q_weight", corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.device("q_weight"),
        *corruptions.float_tensor("k_weight", optional=True),
        corruptions.shape("k_weight", corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.device("k_weight"),
        *_integers("position_ids"),
        corruptions.Corruption("position_ids", "other tokens", ValueError, _other_tokens),
        corruptions.Corruption("position_ids", "three axes without sections", ValueError, _needs_sections),
        corruptions.Corruption("mrope_section", "another sum", ValueError, _wrong_sum),
        corruptions.value("mrope_section", ValueError, "not three counts", [1], [], [-1, 1, 1], (1, 2, 3, 4)),
        corruptions.value("mrope_section", TypeError, "not ints", 3, "3", [1.0, 2.0, 1.0], (True, 1, 1)),
        *_BASE,
        *nonnegative("eps"),
        corruptions.value("interleaved", TypeError, "not a bool", 1, "yes", None),
        corruptions.value("rotary_dim", ValueError, "odd, or none that fits", 1, 0, -2, 5000, 3),
        corruptions.value("rotary_dim", TypeError, "not an int", 2.0, "2", True),
    ),
    _terms,
)


def _vision_arguments(draw: Draw) -> dict[str, Any]:
    dtype, kind = tensor_dtype(draw), draws.kinds(draw)
    merge, dim = draw.choice((1, 2, 2, 3)), draw.choice((4, 8, 20, 64, 72, 80, 128))
    sizes = [
        [draw.choice((1, 1, 2, 3)), merge * draw.integer(1, 3), merge * draw.integer(1, 3)]
        for _ in range(draw.integer(0, 3))
    ]
    grid = torch.tensor(sizes, dtype=draw.choice(_INTEGERS)).reshape(-1, 3)
    heads, kv_heads = draw.choice(((1, 1), (2, 2), (3, 1), (16, 16), (18, 18)))
    patches = int(grid.prod(1).sum())
    by_position = draw.one_in(3)
    return {
        "q": draws.tensor(draw, (patches, heads, dim), dtype, kind()),
        "k": draws.tensor(draw, (patches, kv_heads, dim), dtype, kind()),
        "grid_thw": None if by_position else draws.laid_out(grid, draw.choice(_SPACED)),
        "merge_size": merge,
        "positions": _positions(draw, (patches, 2)) if by_position else None,
        "theta": draw.choice((10000.0, 500)),
        "numerics": draw.choice(draws.NUMERICS),
    }


def _vision_terms(call: Call) -> dict[str, Tensor]:
    terms = {}
    for name in ("q", "k"):
        x = call.arguments[name]
        terms[f"{name}_turned"] = _turned(x.double(), x.shape[-1]) + torch.finfo(x.dtype).smallest_normal
        grad = call.grads.get(f"{name}_turned", torch.zeros_like(x)).double().nan_to_num(0.0, 0.0, 0.0)
        terms[f"grad_{name}"] = _turned(grad, x.shape[-1]) + torch.finfo(x.dtype).smallest_normal
    return terms


def _six_wide(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str]:
    wrong = {name: arguments[name].new_zeros((*arguments[name].shape[:-1], 6)) for name in ("q", "k")}
    return wrong, str(list(wrong["q"].shape))


def _wrong_image(grid: Tensor, draw: Draw) -> tuple[Tensor, str]:
    wrong = torch.cat((grid, grid.new_tensor([draw.choice(([0, 6, 6], [1, -6, 6], [-2, 6, 6]))])))
    return wrong, str(wrong[-1].tolist())


def _wrong_multiple(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
    grid, merge = arguments["grid_thw"], arguments["merge_size"]
    if grid is None or merge == 1 or not len(grid):
        return None
    wrong = grid.clone()
    wrong[0, 2] += 1
    return {"grid_thw": wrong}, str(wrong[0].tolist())


def _wrong_total(grid: Tensor, draw: Draw) -> tuple[Tensor, str]:
    wrong = torch.cat((grid, grid.new_tensor([[1, 6, 6]])))
    return wrong, str(int(wrong.prod(1).sum()))


def _both_given(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
    if arguments["grid_thw"] is None:
        return None
    wrong = torch.zeros(arguments["q"].shape[0], 2, dtype=torch.int64)
    return {"positions": wrong}, str(list(wrong.shape))


VISION_ROPE = OperatorCase(
    "vision_rope",
    vision_rope,
    _vision_arguments,
    _results,
    ("q", "k"),
    (
        *_heads(),
        corruptions.Corruption("q", "no multiple of 4", ValueError, _six_wide),
        *_integers("grid_thw", optional=True),
        corruptions.shape("grid_thw", corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.changed("grid_thw", ValueError, "an image of no size", _wrong_image),
        corruptions.Corruption("grid_thw", "no multiple", ValueError, _wrong_multiple),
        corruptions.changed("grid_thw", ValueError, "another total", _wrong_total),
        *(fault for fault in _integers("positions", optional=True) if fault.what != "not a tensor"),
        corruptions.shape("positions", corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.Corruption("positions", "beside a grid", ValueError, _both_given),
        corruptions.value("merge_size", ValueError, "below 1", 0, -2),
        corruptions.value("merge_size", TypeError, "not an int", 2.0, "2", True, None),
        *_BASE,
    ),
    _vision_terms,
)

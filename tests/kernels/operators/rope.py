"""Cases of the rotary positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import mrope_positions

from .. import draws
from ..draws import Draw
from ..rope_index import MODELS, draw_batch, draw_large
from . import corruptions
from .case import IndexCase
from .corruptions import Corruption


def _arguments(draw: Draw) -> dict[str, Any]:
    kind = draw.choice(sorted(MODELS))
    small = not draw.one_in(64)
    made = draw_batch(draw, kind, draw.choice((2, 1, 3)), draw.boolean()) if small else draw_large(draw, kind)
    arguments = made.arguments
    if draw.one_in(3):
        arguments["mm_token_type_ids"] = None
    elif draw.boolean():
        arguments["mm_token_type_ids"] = arguments["mm_token_type_ids"].int()
    if draw.boolean():
        arguments["cu_seqlens"] = arguments["cu_seqlens"].int()
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            arguments[name] = draws.laid_out(value, draw.choice(("contiguous", "contiguous", "offset", "every other")))
    return arguments


def _results(input_ids: Tensor, cu_seqlens: Tensor, **_: Any) -> Any:
    tokens, samples = input_ids.shape[0], cu_seqlens.shape[0] - 1
    return {"position_ids": ((3, tokens), torch.int64), "deltas": ((samples,), torch.int64)}


def _grid(argument: str) -> tuple[Corruption, ...]:
    def one_more(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
        grid, seconds = arguments[argument], arguments["second_per_grid_ts"]
        if grid is None:
            return None
        changes = {argument: torch.cat([grid, grid[:1]])}
        if argument == "video_grid_thw" and seconds is not None:
            changes["second_per_grid_ts"] = torch.cat([seconds, seconds[:1]])
        return changes, str(len(grid) + 1)

    def larger(grid: Tensor, draw: Draw) -> tuple[Tensor, str]:
        wrong, row = grid.clone(), draw.integer(0, len(grid) - 1)
        wrong[row, draw.integer(0, 2)] *= 2
        return wrong, ""

    def negative(grid: Tensor, draw: Draw) -> tuple[Tensor, str]:
        wrong, row = grid.clone(), draw.integer(0, len(grid) - 1)
        wrong[row, draw.integer(0, 2)] = draw.choice((0, -1, -(2**62), 2**62))
        return wrong, str(wrong[row].tolist())

    return (
        Corruption(argument, "one more", ValueError, one_more),
        corruptions.changed(argument, ValueError, "larger than its tokens", larger),
        corruptions.changed(argument, ValueError, "absurd", negative),
        *corruptions.index_tensor(argument, optional=True),
        corruptions.shape(argument, corruptions.wider, corruptions.deeper, lambda shape: (shape[0],)),
        corruptions.device(argument),
    )


def _missing_rate(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
    return None if arguments["tokens_per_second"] is None else ({"tokens_per_second": None}, "None")


def _rate(error: type[Exception], what: str, *options: Any) -> Corruption:
    def change(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
        wrong = draw.choice(options)
        return None if arguments["tokens_per_second"] is None else ({"tokens_per_second": wrong}, repr(wrong))

    return Corruption("tokens_per_second", what, error, change)


def _typed(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
    types = arguments["mm_token_type_ids"]
    if types is None or not len(types):
        return None
    wrong = types.clone()
    wrong[draw.integer(0, len(types) - 1)] = draw.choice((3, -1, 1 << 30))
    return {"mm_token_type_ids": wrong}, ""


MROPE_POSITIONS = IndexCase(
    "mrope_positions",
    mrope_positions,
    _arguments,
    _results,
    (),
    (
        *corruptions.index_tensor("input_ids"),
        corruptions.shape("input_ids", corruptions.deeper, corruptions.scalar),
        *corruptions.bounds("cu_seqlens"),
        corruptions.device("cu_seqlens"),
        corruptions.shape("cu_seqlens", corruptions.deeper, lambda shape: (0,)),
        corruptions.value("cu_seqlens", TypeError, "not a tensor", [0, 1], None, 3),
        corruptions.dtype("mm_token_type_ids", torch.int16, torch.bool, torch.float32),
        corruptions.shape("mm_token_type_ids", corruptions.deeper, corruptions.longer),
        corruptions.device("mm_token_type_ids"),
        Corruption("mm_token_type_ids", "an unknown type", ValueError, _typed),
        *_grid("image_grid_thw"),
        *_grid("video_grid_thw"),
        corruptions.dtype("second_per_grid_ts", torch.float64, torch.bfloat16, torch.int64),
        corruptions.shape("second_per_grid_ts", corruptions.longer, corruptions.deeper),
        corruptions.changed(
            "second_per_grid_ts", ValueError, "negative", lambda seconds, draw: (torch.full_like(seconds, -2.0), "-4")
        ),
        Corruption("tokens_per_second", "missing", ValueError, _missing_rate),
        _rate(TypeError, "not a number", "2", [2]),
        _rate(ValueError, "negative or endless", -1.0, float("inf"), float("nan")),
        corruptions.value("image_token_id", TypeError, "not an int", "<|image_pad|>", 1.0, None, True),
        corruptions.value("video_token_id", TypeError, "not an int", "<|video_pad|>", 1.0, None, False),
        corruptions.value("merge_size", TypeError, "not an int", "2", 2.0, None, True),
        corruptions.value("merge_size", ValueError, "not positive", 0, -2),
        corruptions.value("kind", ValueError, "unknown", "qwen2_vl", "", None, 3),
    ),
    share=2,
)

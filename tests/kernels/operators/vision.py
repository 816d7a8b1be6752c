"""Cases of the vision operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import deepstack_add, interpolate_position_embeddings, scatter_vision

from .. import draws
from ..draws import Draw
from . import corruptions
from .case import Call, OperatorCase
from .corruptions import Corruption
from .options import NUMERICS, tensor_dtype


def _feature_rows(base: str) -> Callable[[Draw], dict[str, Any]]:
    def arguments(draw: Draw) -> dict[str, Any]:
        shape, dtype, kind = draws.shape(draw), tensor_dtype(draw), draws.kinds(draw)
        shape = shape if len(shape) > 1 else (1, *shape)
        rows = shape[:-1]
        count = torch.Size(rows).numel()
        some = draw.choice((draw.integer(0, count), count, 0))
        positions = torch.randperm(count, generator=torch.Generator().manual_seed(draw.integer(0, 2**32 - 1)))[:some]
        positions = positions.sort().values if draw.boolean() else positions
        return {
            base: draws.tensor(draw, shape, dtype, kind()),
            "features": draws.tensor(draw, (some, shape[-1]), dtype, kind()),
            "positions": draws.laid_out(positions, draw.choice(("contiguous", "offset", "every other"))),
        }

    return arguments


def _faulty_position(arguments: dict[str, Any], draw: Draw, wrong: int) -> tuple[dict[str, Any], str]:
    positions = arguments["positions"].clone()
    positions[draw.integer(0, len(positions) - 1)] = wrong
    return {"positions": positions}, str(wrong)


def _out_of_range(base: str) -> Corruption:
    def change(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
        if not len(arguments["positions"]):
            return None
        rows = arguments[base].shape[:-1].numel()
        return _faulty_position(arguments, draw, draw.choice((rows, -1, -(2**40), 2**62)))

    return Corruption("positions", "out of range", ValueError, change)


def _twice(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
    positions = arguments["positions"].clone()
    if len(positions) < 2:
        return None
    first = draw.integer(0, len(positions) - 2)
    positions[first + 1] = positions[first]
    return {"positions": positions}, str(int(positions[first]))


def _into_rows(function: Callable[..., Tensor], base: str) -> OperatorCase:
    def results(**arguments: Any) -> Any:
        return {"output": (arguments[base].shape, arguments[base].dtype)}

    return OperatorCase(
        function.__name__,
        function,
        _feature_rows(base),
        results,
        (base, "features"),
        (
            *corruptions.float_tensor(base),
            corruptions.shape(base, corruptions.scalar, lambda shape: shape[-1:]),
            corruptions.shape(base, corruptions.wider, blamed="features"),
            *corruptions.float_tensor("features"),
            corruptions.float_dtype("features"),
            corruptions.shape("features", corruptions.wider, corruptions.deeper, corruptions.scalar),
            corruptions.shape("features", corruptions.longer, blamed="positions"),
            corruptions.device("features"),
            *corruptions.index_tensor("positions"),
            corruptions.shape("positions", corruptions.longer, corruptions.deeper, corruptions.scalar),
            corruptions.device("positions"),
            _out_of_range(base),
            Corruption("positions", "there twice", ValueError, _twice),
        ),
    )


SCATTER_VISION = _into_rows(scatter_vision, "inputs_embeds")
DEEPSTACK_ADD = _into_rows(deepstack_add, "hidden_states")


def _grids(draw: Draw, merge: int) -> Tensor:
    if draw.one_in(64):  # enough patches for threads to share, more lines of a video than are summed at once
        sizes = draw.choice(([(1, 30, 24), (2, 6, 42)], [(70, 2, 3)], [(1, 40, 40)]))
    else:
        side = lambda: draw.integer(1, 3) if not draw.one_in(8) else draw.choice((5, 9, 16))  # noqa: E731
        frames = lambda: 1 if not draw.one_in(4) else draw.integer(2, 3)  # noqa: E731
        sizes = [(frames(), side(), side()) for _ in range(draw.integer(1, 3) if not draw.one_in(12) else 0)]
    return torch.tensor([(t, h * merge, w * merge) for t, h, w in sizes], dtype=torch.int64).reshape(-1, 3)


def _interpolated(draw: Draw) -> dict[str, Any]:
    dtype, kind = tensor_dtype(draw), draws.kinds(draw)
    side = draw.choice((3, 1, 2, 4, 7, 10)) if not draw.one_in(32) else 48
    width = draw.integer(1, 80) if not draw.one_in(8) else draw.choice((127, 128, 129, 257, 513, 1152))
    merge = draw.choice((2, 1, 3))
    grid_thw = _grids(draw, merge)
    patches = int(grid_thw.prod(1).sum())
    hidden = None
    if not draw.one_in(4):
        other = torch.float32 if draw.one_in(64) else dtype
        hidden = draws.tensor(draw, (patches, width), other, kind())
    return {
        "table": draws.tensor(draw, (side * side, width), dtype, kind()),
        "grid_thw": draws.laid_out(grid_thw, draw.choice(("contiguous", "wide rows"))),
        "merge_size": merge,
        "hidden_states": hidden,
        "num_patches": patches if hidden is None and draw.boolean() else None,
        "numerics": draw.choice(draws.NUMERICS),
    }


def _interpolated_results(table: Tensor, grid_thw: Tensor, hidden_states: Tensor | None, **_: Any) -> Any:
    like = table if hidden_states is None else hidden_states
    return {"embedded": ((int(grid_thw.prod(1).sum()), table.shape[1]), like.dtype)}


def _interpolated_terms(call: Call) -> dict[str, Tensor]:
    """A place of the table takes from many patches, whose gradients may cancel."""
    if "table" not in call.wanted:
        return {}
    arguments = call.arguments | {"hidden_states": None, "num_patches": call.grads["embedded"].shape[0]}
    arguments["table"] = torch.zeros_like(arguments["table"], dtype=torch.float64).requires_grad_()
    grad = call.grads["embedded"].double().abs().nan_to_num(0.0, 0.0, 0.0)
    terms = torch.autograd.grad(interpolate_position_embeddings(**arguments), arguments["table"], grad)
    return {"grad_table": terms[0]}


def _wider_table(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
    table = arguments["table"]
    if arguments["hidden_states"] is None:
        return None
    return {"table": table.new_zeros(len(table), table.shape[1] + 1)}, ""


def _no_grid(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
    grids, merge = arguments["grid_thw"].clone(), arguments["merge_size"]
    if not len(grids):
        return None
    wrong = [(axis, value) for axis in range(3) for value in (0, -1, -merge, -(2**62))]
    wrong += [(axis, merge + 1) for axis in (1, 2) if merge > 1]
    index, (axis, value) = draw.integer(0, len(grids) - 1), draw.choice(wrong)
    grids[index, axis] = value
    return {"grid_thw": grids}, str(grids[index].tolist())


def _another_count(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
    grids, merge = arguments["grid_thw"], arguments["merge_size"]
    if arguments["hidden_states"] is None and arguments["num_patches"] is None:
        return None
    if len(grids) and draw.boolean():
        fewer = grids[1:]
        return {"grid_thw": fewer}, f"{int(fewer.prod(1).sum())} patches"
    size = draw.choice((merge, 2**40 * merge))
    more = torch.cat([grids, torch.tensor([[1, merge, size]])])
    return {"grid_thw": more}, f"{int(grids.prod(1).sum()) + merge * size} patches"


def _another_num_patches(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
    if arguments["hidden_states"] is None:
        return None
    rows = len(arguments["hidden_states"])
    return {"num_patches": rows + 1}, f"[{rows}, {arguments['hidden_states'].shape[1]}]"


INTERPOLATE = OperatorCase(
    "interpolate_position_embeddings",
    interpolate_position_embeddings,
    _interpolated,
    _interpolated_results,
    ("table", "hidden_states"),
    (
        *corruptions.float_tensor("table"),
        corruptions.shape("table", corruptions.longer, corruptions.deeper, corruptions.scalar, lambda s: (0, s[1])),
        Corruption("hidden_states", "another width of table", ValueError, _wider_table),
        *corruptions.index_tensor("grid_thw"),
        corruptions.shape("grid_thw", corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.device("grid_thw"),
        Corruption("grid_thw", "no grid", ValueError, _no_grid),
        Corruption("grid_thw", "of another number of patches", ValueError, _another_count),
        corruptions.value("merge_size", TypeError, "not an int", 2.0, "2", True, None),
        corruptions.value("merge_size", ValueError, "not positive", 0, -2),
        corruptions.value("num_patches", TypeError, "not an int", 2.0, "2", True),
        corruptions.value("num_patches", ValueError, "negative", -1, -(2**40)),
        Corruption("hidden_states", "not num_patches", ValueError, _another_num_patches),
        *corruptions.float_tensor("hidden_states", optional=True),
        corruptions.shape("hidden_states", corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.shape("hidden_states", corruptions.longer, blamed="grid_thw"),
        corruptions.device("hidden_states"),
        NUMERICS,
    ),
    _interpolated_terms,
)

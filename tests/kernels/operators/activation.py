"""Cases of the gated activations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from m4ov_kernels import swiglu

from .. import draws
from ..draws import Draw
from . import corruptions
from .case import OperatorCase
from .options import NUMERICS, tensor_dtype


def _arguments(draw: Draw) -> dict[str, Any]:
    shape, dtype, kind = draws.shape(draw), tensor_dtype(draw), draws.kinds(draw)
    numerics = draw.choice(draws.NUMERICS)
    if draw.one_in(4):  # the two halves of one projection
        both = draws.tensor(draw, (*shape[:-1], 2 * shape[-1]), dtype, kind())
        gate, up = both.chunk(2, dim=-1)
    else:
        gate, up = (draws.tensor(draw, shape, dtype, kind()) for _ in range(2))
    return {"gate": gate, "up": up, "numerics": numerics}


def _results(gate: Tensor, **_: Any) -> Any:
    return {"activated": (gate.shape, gate.dtype)}


SWIGLU = OperatorCase(
    "swiglu",
    swiglu,
    _arguments,
    _results,
    ("gate", "up"),
    (
        *corruptions.float_tensor("gate"),
        corruptions.shape("gate", corruptions.wider, corruptions.deeper, corruptions.scalar, blamed="up"),
        *corruptions.float_tensor("up"),
        corruptions.float_dtype("up"),
        corruptions.shape("up", corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.device("up"),
        NUMERICS,
    ),
)

"""Cases of the gated activations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from m4ov_kernels import swiglu

from .. import draws
from ..draws import Draw
from . import corruptions
from .case import Call, OperatorCase
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


def _terms(call: Call) -> dict[str, Tensor]:
    """Where one element outweighs all others, PyTorch's error in it says nothing: ours may be one float32 rounding (a
    quarter of what a term may carry) larger by chance. Both are at most 1.9 eps, measured over 10⁶ elements. In the
    gradient of ``gate`` two terms cancel, near -1.28."""
    gate, up = call.arguments["gate"].double(), call.arguments["up"].double()
    sigmoid = gate.sigmoid()
    terms = {"activated": gate * sigmoid * up / 4}
    if call.wanted:
        grad = call.grads["activated"].double() * sigmoid
        terms["grad_up"] = grad * gate / 4
        terms["grad_gate"] = grad * up * (1 + (gate * (1 - sigmoid)).abs())
    return terms


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
    _terms,
)

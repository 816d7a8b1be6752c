"""Cases of the activations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import geglu, gelu, swiglu

from .. import draws
from ..draws import Draw
from . import corruptions
from .case import Call, OperatorCase
from .options import NUMERICS, tensor_dtype

APPROXIMATE = corruptions.value("approximate", ValueError, "unknown", "TANH", "", "erf", None, 0, b"tanh", ["tanh"])


def _gated_arguments(draw: Draw) -> dict[str, Any]:
    shape, dtype, kind = draws.shape(draw), tensor_dtype(draw), draws.kinds(draw)
    numerics = draw.choice(draws.NUMERICS)
    if draw.one_in(4):  # the two halves of one projection
        both = draws.tensor(draw, (*shape[:-1], 2 * shape[-1]), dtype, kind())
        gate, up = both.chunk(2, dim=-1)
    else:
        gate, up = (draws.tensor(draw, shape, dtype, kind()) for _ in range(2))
    return {"gate": gate, "up": up, "numerics": numerics}


def _geglu_arguments(draw: Draw) -> dict[str, Any]:
    return _gated_arguments(draw) | {"approximate": draw.choice(("tanh", "none"))}


def _gelu_arguments(draw: Draw) -> dict[str, Any]:
    shape, dtype, kind = draws.shape(draw), tensor_dtype(draw), draws.kinds(draw)
    mixed = torch.float32 if draw.one_in(64) else dtype
    return {
        "input": draws.tensor(draw, shape, dtype, kind()),
        "bias": draws.tensor(draw, shape[-1:], mixed, kind()) if draw.boolean() else None,
        "approximate": draw.choice(("tanh", "none")),
    }


def _gated_results(gate: Tensor, **_: Any) -> Any:
    return {"activated": (gate.shape, gate.dtype)}


def _gelu_results(input: Tensor, **_: Any) -> Any:
    return {"activated": (input.shape, input.dtype)}


def _swiglu_terms(call: Call) -> dict[str, Tensor]:
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


def gelu_share(x: Tensor, approximate: str) -> Tensor:
    """``gelu(x) / x`` of float64, to its last places far below 0 too."""
    if approximate == "tanh":
        return (2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).sigmoid()
    return torch.erfc(x * -math.sqrt(0.5)) / 2


def gelu_parts(x: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """``gelu(x)`` and the two terms of its slope, which cancel near -0.75, in float64. A value below 0 is an
    exponential, which multiplies the rounding of its exponent by that exponent."""
    share = gelu_share(x, approximate)
    if approximate == "tanh":
        exponent = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        density = share * (-exponent).sigmoid() * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    else:
        exponent = x * x / 2
        density = torch.exp(-exponent) / math.sqrt(2 * math.pi)
    amplified = 1 + exponent.abs() * (1 - share)
    value = (x * share).abs() * amplified / 4
    return value, share * amplified / 4 + (x * density).abs().nan_to_num(0.0) * (1 + exponent.abs())


def _geglu_terms(call: Call) -> dict[str, Tensor]:
    gate, up = call.arguments["gate"].double(), call.arguments["up"].double()
    value, slope = gelu_parts(gate, call.arguments["approximate"])
    terms = {"activated": value * up.abs()}
    if call.wanted:
        grad = call.grads["activated"].double().abs()
        terms |= {"grad_up": grad * value, "grad_gate": grad * up.abs() * slope}
    return terms


def geglu_far_below_zero(dtype: torch.dtype, up: float, approximate: str, numerics: str) -> Call:
    """Where PyTorch's 1 + tanh and 1 + erf are 0 and the value is not; all rows share their memory."""
    gate, up_, grad = (torch.full((1, 1), value, dtype=dtype).expand(4, 1) for value in (-10.0, up, 3.0))
    arguments = {"gate": gate, "up": up_, "approximate": approximate, "numerics": numerics}
    return Call(arguments, {"activated": grad}, ("gate", "up"))


def _gelu_terms(call: Call) -> dict[str, Tensor]:
    x = call.arguments["input"].double()
    if call.arguments["bias"] is not None:
        x = x + call.arguments["bias"].double()
    value, slope = gelu_parts(x, call.arguments["approximate"])
    terms = {"activated": value}
    if call.wanted:
        to_x = call.grads["activated"].double().abs() * slope
        terms |= {"grad_input": to_x, "grad_bias": to_x.reshape(-1, x.shape[-1]).sum(0)}
    return terms


_GATED_CORRUPTIONS = (
    *corruptions.float_tensor("gate"),
    corruptions.shape("gate", corruptions.wider, corruptions.deeper, corruptions.scalar, blamed="up"),
    *corruptions.float_tensor("up"),
    corruptions.float_dtype("up"),
    corruptions.shape("up", corruptions.wider, corruptions.deeper, corruptions.scalar),
    corruptions.device("up"),
    NUMERICS,
)

SWIGLU = OperatorCase(
    "swiglu", swiglu, _gated_arguments, _gated_results, ("gate", "up"), _GATED_CORRUPTIONS, _swiglu_terms
)
GEGLU = OperatorCase(
    "geglu",
    geglu,
    _geglu_arguments,
    _gated_results,
    ("gate", "up"),
    (*_GATED_CORRUPTIONS, APPROXIMATE),
    _geglu_terms,
)
GELU = OperatorCase(
    "gelu",
    gelu,
    _gelu_arguments,
    _gelu_results,
    ("input", "bias"),
    (
        *corruptions.float_tensor("input"),
        *corruptions.float_tensor("bias", optional=True),
        corruptions.shape("bias", corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.device("bias"),
        APPROXIMATE,
    ),
    _gelu_terms,
)

"""Cases of the norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import layer_norm, rms_norm

from .. import draws
from ..draws import Draw
from ..numerics import BEYOND, layer_norm_terms, rms_norm_terms
from . import corruptions
from .case import Call, OperatorCase
from .options import NUMERICS, nonnegative, tensor_dtype


def _arguments(draw: Draw) -> dict[str, Any]:
    shape, dtype, numerics = draws.shape(draw), tensor_dtype(draw), draw.choice(draws.NUMERICS)
    mixed, added = draw.one_in(64), draw.boolean()
    # Then the sum that is normalised may be infinite, or 0, only after rounding, and the backward sees it rounded.
    apart = added and numerics == "fp32"
    kind = draws.kinds(draw, draws.GRADIENT_VALUES if apart else draws.VALUES)
    return {
        "hidden_states": draws.tensor(draw, shape, dtype, kind()),
        "weight": draws.tensor(draw, shape[-1:], torch.float32 if mixed else dtype, kind()),
        "residual": draws.tensor(draw, shape, dtype, kind()) if added else None,
        "eps": draw.choice((1e-6, 1e-5, 1.0) if apart else (1e-6, 1e-5, 1.0, 0, 1e-38)),
        "numerics": numerics,
    }


def _results(hidden_states: Tensor, weight: Tensor, residual: Tensor | None, numerics: str, **_: Any) -> Any:
    dtype = hidden_states.dtype
    promoted = torch.promote_types(dtype, weight.dtype) if numerics == "hf" else dtype
    normed = {"normed": (hidden_states.shape, promoted)}
    return normed if residual is None else normed | {"total": (hidden_states.shape, dtype)}


def _rounds_to_infinity(total: Tensor, call: Call) -> Tensor:
    """Where the sum that is returned, and kept for the backward, is infinite though what was normalised is not. (Of
    float16 its summands are kept.)"""
    dtype = call.arguments["hidden_states"].dtype
    return total.abs() > (0.99 * torch.finfo(dtype).max if dtype is not torch.float16 else torch.inf)


def _terms(call: Call) -> dict[str, Tensor]:
    if not call.wanted:
        return {}
    x, weight = (call.arguments[name].double() for name in ("hidden_states", "weight"))
    if call.arguments["residual"] is not None:
        x = x + call.arguments["residual"].double()
    grad = call.grads["normed"].double() if "normed" in call.grads else torch.zeros_like(x)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + call.arguments["eps"])
    to_x = rms_norm_terms(grad, x, weight, rstd)
    if "total" in call.grads:
        to_x = to_x + call.grads["total"].double().abs()
    # With an infinite sum of squares the factor is 0, and 0 times another infinite sum NaN.
    dots = (grad * weight * x).abs().sum(-1, keepdim=True)
    sums = torch.maximum(x.square().sum(-1, keepdim=True), torch.maximum(dots, dots * rstd))
    to_x = torch.where(sums > 0.9 * torch.finfo(torch.float32).max, BEYOND, to_x)
    to_weight = (grad * x * rstd).abs()
    if call.arguments["residual"] is not None and call.arguments["numerics"] == "fp32":
        past = _rounds_to_infinity(x, call)
        to_x, to_weight = torch.where(past.any(-1, keepdim=True), BEYOND, to_x), torch.where(past, BEYOND, to_weight)
    to_weight = to_weight.reshape(-1, x.shape[-1]).sum(0)
    return {"grad_hidden_states": to_x, "grad_residual": to_x, "grad_weight": to_weight}


RMS_NORM = OperatorCase(
    "rms_norm",
    rms_norm,
    _arguments,
    _results,
    ("hidden_states", "weight", "residual"),
    (
        *corruptions.float_tensor("hidden_states"),
        corruptions.shape("hidden_states", corruptions.scalar),
        corruptions.shape("hidden_states", corruptions.wider, corruptions.doubled, blamed="weight"),
        *corruptions.float_tensor("weight"),
        corruptions.shape("weight", corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.device("weight"),
        *corruptions.float_tensor("residual", optional=True),
        corruptions.float_dtype("residual"),
        corruptions.shape("residual", corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.device("residual"),
        *nonnegative("eps"),
        NUMERICS,
    ),
    _terms,
)


def _layer_norm_arguments(draw: Draw) -> dict[str, Any]:
    arguments = _arguments(draw)
    hidden_states, weight = arguments["hidden_states"], arguments["weight"]
    bias = draws.tensor(draw, hidden_states.shape[-1:], weight.dtype, "normal") if draw.boolean() else None
    return arguments | {"weight": weight if draw.boolean() or bias is not None else None, "bias": bias}


def _layer_norm_results(hidden_states: Tensor, residual: Tensor | None, **_: Any) -> Any:
    normed = {"normed": (hidden_states.shape, hidden_states.dtype)}
    return normed if residual is None else normed | {"total": (hidden_states.shape, hidden_states.dtype)}


def _layer_norm_terms(call: Call) -> dict[str, Tensor]:
    arguments = call.arguments
    dtype, x = arguments["hidden_states"].dtype, arguments["hidden_states"].double()
    apart = arguments["residual"] is not None and arguments["numerics"] == "fp32"
    if arguments["residual"] is not None:
        x = x + arguments["residual"].double()
    grad = call.grads["normed"].double() if "normed" in call.grads else torch.zeros_like(x)
    terms = layer_norm_terms(grad, x, arguments["weight"], arguments["bias"], arguments["eps"], dtype, apart)
    to_x = terms["grad_hidden_states"]
    if "total" in call.grads:
        to_x = to_x + call.grads["total"].double().abs()
    # With an infinite sum of squares the factor is 0, and 0 times another infinite sum NaN.
    far = (x - x.mean(-1, keepdim=True)).abs()
    weighted = (grad if arguments["weight"] is None else grad * arguments["weight"].double()).abs()
    sums = torch.maximum((4 * far.square()).sum(-1, keepdim=True), 4 * (weighted * far).sum(-1, keepdim=True))
    to_x = torch.where(sums > 0.9 * torch.finfo(torch.float32).max, BEYOND, to_x)
    largest = x.abs().amax(-1, keepdim=True)
    endless = largest > 0.2 * torch.finfo(torch.float32).max  # sums of the row, and differences from its mean
    to_x, to_weight = torch.where(endless, BEYOND, to_x), terms["grad_weight"]
    to_weight = torch.where(endless.any(), BEYOND, to_weight)
    if apart:
        past = _rounds_to_infinity(x, call)
        to_x = torch.where(past.any(-1, keepdim=True), BEYOND, to_x)
        to_weight = torch.where(past.reshape(-1, x.shape[-1]).any(0), BEYOND, to_weight)
    return terms | {"grad_hidden_states": to_x, "grad_residual": to_x, "grad_weight": to_weight}


LAYER_NORM = OperatorCase(
    "layer_norm",
    layer_norm,
    _layer_norm_arguments,
    _layer_norm_results,
    ("hidden_states", "weight", "bias", "residual"),
    (
        *corruptions.float_tensor("hidden_states"),
        corruptions.shape("hidden_states", corruptions.scalar),
        *corruptions.float_tensor("weight", optional=True),
        corruptions.shape("weight", corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.device("weight"),
        *corruptions.float_tensor("bias", optional=True),
        corruptions.shape("bias", corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.device("bias"),
        *corruptions.float_tensor("residual", optional=True),
        corruptions.float_dtype("residual"),
        corruptions.shape("residual", corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.device("residual"),
        *nonnegative("eps"),
        NUMERICS,
    ),
    _layer_norm_terms,
)

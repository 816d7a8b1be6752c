"""Cases of the linears of quantised weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import fp8_linear, int4_linear, int8_linear
from m4ov_kernels.gemm import reference
from m4ov_kernels.gemm.linear import ACTIVATIONS, EPILOGUES, resolved
from m4ov_kernels.gemm.panels import KINDS
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight
from m4ov_kernels.gemm.weights.fp8 import LARGEST

from .. import draws
from ..draws import Draw
from ..numerics import BEYOND, EPS
from ..quantized import drawn_weight
from . import corruptions
from .activation import gelu_parts
from .case import Call, OperatorCase
from .corruptions import Corruption
from .options import tensor_dtype

SINGLE = EPS[torch.float32]
TINY = torch.finfo(torch.float32).smallest_normal
LEAST = 2.0**-149  # of float32's subnormals
LIMIT = torch.finfo(torch.float32).max / 16  # past it, sums may overflow in one order and not in another
ROWS, WIDTHS, COLUMNS = (16, 17, 63, 65, 130), (127, 128, 129, 255, 256, 300, 512), (127, 128, 129, 192, 257)


def _rows(draw: Draw) -> tuple[int, ...]:
    if draw.one_in(12):
        return ()
    rows = draw.integer(0, 9)
    if draw.one_in(6):
        rows = draw.choice(ROWS) if not draw.one_in(12) else draw.integer(0, 600)
    return (2, rows // 2) if draw.one_in(4) else (rows,)


def _size(draw: Draw, some: tuple[int, ...], few: tuple[int, ...]) -> int:
    if draw.one_in(256):
        return draw.choice(few)
    return draw.choice(some) if draw.one_in(8) else draw.integer(1, 80)


def _arguments(kind: str, draw: Draw) -> dict[str, Any]:
    rows, dtype, values = _rows(draw), tensor_dtype(draw), draws.kinds(draw)
    epilogue = draw.choice(EPILOGUES) if draw.one_in(2) else None
    N, K = _size(draw, COLUMNS, (1152,)), _size(draw, WIDTHS, (1152, 3420, 4304))
    if epilogue == "swiglu":
        N, width = 2 * N, N
    else:
        width = N
    found: dict[str, Any] = {
        "x": draws.tensor(draw, (*rows, K), dtype, values()),
        "weight": drawn_weight(kind, N, K, draw),
        "bias": draws.tensor(draw, (N,), dtype, values()) if draw.boolean() else None,
        "residual": draws.tensor(draw, (*rows, width), dtype, values()) if draw.boolean() else None,
        "epilogue": epilogue,
    }
    return found if kind == "int8" else found | {"activation": draw.choice(ACTIVATIONS[kind])}


def _results(x: Tensor, weight: Any, epilogue: str | None, **_: Any) -> Any:
    width = weight.shape[0] // 2 if epilogue == "swiglu" else weight.shape[0]
    return {"output": ((*x.shape[:-1], width), x.dtype)}


def steps(weight: Int4Weight | Int8Weight | Fp8Weight) -> Tensor:
    """What a code of 1 is worth, float64 [N, K]."""
    N, K = weight.shape
    scales = weight.scales.double().abs()
    if isinstance(weight, Int4Weight):
        return scales[:, weight.groups().long()]
    if isinstance(weight, Fp8Weight) and weight.granularity == "block":
        return scales.repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K]
    return scales.expand(N, K)


def _product(x: Tensor, weight: Any, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """The product in float64; how far float32 sums of it may lie from it: roundings of partial sums, whose size is the
    root of the sum of the squared products, subnormals, which a processor's bfloat16 products take for 0, and scales
    that are multiplied with each other below the normal range; and where an intermediate sum may overflow."""
    single = x.float()
    if getattr(weight, "pre_quant_scale", None) is not None:
        single = single * weight.pre_quant_scale.float()
    single = single.reshape(-1, x.shape[-1])
    rows = reference.rounded(single, weight, activation, torch.float64)
    matrix, step = weight.dequantize(torch.float64), steps(weight)
    product, partial = rows @ matrix.t(), rows.square() @ matrix.square().t()
    if bias is not None:
        product, partial = product + bias.double(), partial + bias.double().square()
    walk = 1 + math.sqrt(x.shape[-1]) / 8
    bound = 4 * SINGLE * walk * partial.sqrt() + TINY * (matrix.abs() + step).sum(1)
    codes = (matrix / step).abs()
    size = rows.abs().nan_to_num(0.0, 0.0, 0.0)  # what is infinite itself stays so in any order
    past = (size @ matrix.abs().t() > LIMIT) | (size.sum(1, keepdim=True) * 2 * codes.max() > LIMIT)
    past = past | (product.nan_to_num(0.0, 0.0, 0.0).abs() > LIMIT)
    if activation != "bf16":
        scale = single.double().abs().amax(1, keepdim=True) / 127
        if getattr(weight, "input_scale", None) is not None:
            scale = torch.maximum(scale, weight.input_scale.double().abs())
        bound = bound + LEAST * (LARGEST * codes.sum(1) + x.shape[-1] * scale + step.sum(1))
        past = past | (matrix.abs().sum(1) * LARGEST > LIMIT) | (scale * step.amax(1) > LIMIT)
        past = past | (scale * LARGEST * codes.sum(1) > LIMIT)
    return product, bound, past


def _terms(call: Call) -> dict[str, Tensor]:
    """Errors that float32 sums may have, as terms of which the judge's share is so large."""
    arguments = call.arguments
    x, weight, epilogue = arguments["x"], arguments["weight"], arguments["epilogue"]
    activation = resolved(KINDS[type(weight)], arguments.get("activation", "int8"), x.shape[:-1].numel(), "cpu")
    product, bound, past = _product(x, weight, arguments["bias"], activation)
    share = EPS[x.dtype] + 4 * SINGLE
    # The result, how far it may be off, and its slopes towards the columns of the product with how far those may be.
    if epilogue is None:
        value, off, rises, rises_off = product, bound, torch.ones_like(product), torch.zeros_like(product)
    elif epilogue == "swiglu":
        (gate, up), (gate_off, up_off) = product.chunk(2, 1), bound.chunk(2, 1)
        past = past.chunk(2, 1)[0] | past.chunk(2, 1)[1]
        sigmoid = gate.sigmoid()
        silu, amplified = gate * sigmoid, 1 + (gate * (1 - sigmoid)).abs()
        value = silu * up
        off = value.abs() * amplified * SINGLE + 1.1 * up.abs() * gate_off + silu.abs() * up_off
        rises = torch.cat((up.abs() * sigmoid * amplified, silu.abs()), 1)
        to_gate = up.abs() * (sigmoid * amplified * 4 * SINGLE + gate_off) + 1.1 * up_off
        rises_off = torch.cat((to_gate, silu.abs() * amplified * SINGLE + 1.1 * gate_off), 1)
    else:
        value_terms, slope_terms = gelu_parts(product, "tanh" if epilogue == "gelu_tanh" else "none")
        value, off = product, value_terms * 4 * SINGLE + 1.2 * bound
        rises, rises_off = torch.full_like(product, 1.2), slope_terms * 4 * SINGLE + 1.2 * bound
    if arguments["residual"] is not None:
        residual = arguments["residual"].double().reshape(value.shape)
        off = off + 2 * SINGLE * (value.abs() + residual.abs())
    terms = {"output": torch.where(past, BEYOND, off / share).reshape(*x.shape[:-1], value.shape[1])}
    if not call.wanted:
        return terms
    grad = call.grads["output"].double().reshape(value.shape).abs()
    grad = torch.cat((grad, grad), 1) if epilogue == "swiglu" else grad
    towards, towards_off = grad * rises, grad * rises_off  # of the product
    matrix = weight.dequantize(torch.float64).abs()
    factor = getattr(weight, "pre_quant_scale", None)
    factor = 1.0 if factor is None else factor.double().abs()
    walk = 1 + math.sqrt(matrix.shape[0]) / 8
    # A bfloat16 gradient is multiplied with a weight in bfloat16.
    size = (towards.square() @ matrix.square()).sqrt() * (share if x.dtype is not torch.float32 else 4 * SINGLE * walk)
    size = size + towards_off @ matrix + TINY * (towards.sum(1, keepdim=True) + matrix.sum(0))
    lost = past.any(1, keepdim=True) if epilogue is not None else torch.zeros(len(past), 1, dtype=torch.bool)
    past = lost | (towards @ matrix > LIMIT) | (matrix.amax(0) > LIMIT) | (towards > LIMIT).any(1, keepdim=True)
    terms["grad_x"] = torch.where(past, BEYOND, size * factor / share).reshape(x.shape)
    to_bias = towards.sum(0) + (towards_off / share).sum(0)
    terms["grad_bias"] = torch.where(lost.any() | (to_bias > LIMIT), BEYOND, to_bias)
    return terms


def _odd(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
    rows = arguments["weight"].shape[0]
    return ({"epilogue": "swiglu"}, str(rows)) if rows % 2 else None


def _case(kind: str, function: Any) -> OperatorCase:
    unknown = ("relu", "", "silu", "GELU", 0, b"gelu", ["gelu"], True)
    found = [
        *corruptions.float_tensor("x"),
        corruptions.shape("x", corruptions.wider, corruptions.scalar),
        corruptions.value("weight", TypeError, "not a weight", [1.0], 1.0, "weight", None),
        corruptions.device("weight"),
        corruptions.value("epilogue", ValueError, "unknown", *unknown),
        Corruption("epilogue", "of an odd number of rows", ValueError, _odd),
    ]
    for name in ("bias", "residual"):
        found += [
            *corruptions.float_tensor(name, optional=True),
            corruptions.float_dtype(name),
            corruptions.shape(name, corruptions.wider, corruptions.deeper, corruptions.scalar),
            corruptions.device(name),
        ]
    if kind != "int8":
        found.append(corruptions.value("activation", ValueError, "unknown", "w8", "", None, 8, b"int8", ["int8"]))
    return OperatorCase(
        f"{kind}_linear",
        function,
        lambda draw: _arguments(kind, draw),
        _results,
        ("x", "bias", "residual"),
        tuple(found),
        _terms,
    )


INT4_LINEAR = _case("int4", int4_linear)
INT8_LINEAR = _case("int8", int8_linear)
FP8_LINEAR = _case("fp8", fp8_linear)

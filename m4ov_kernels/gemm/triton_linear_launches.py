"""What launches the Triton kernels of ``quantized_linear``, for ``triton_linear.py``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from m4ov_kernels import configs, gpu
from m4ov_kernels.gemm.options import ACTIVATIONS, EPILOGUES, KINDS
from m4ov_kernels.gemm.triton_linear_around import (
    _quantized_linear_dequantize_kernel,
    _quantized_linear_input_kernel,
)
from m4ov_kernels.gemm.triton_linear_kernels import (
    _quantized_linear_fwd_kernel,
    _quantized_linear_merge_kernel,
)
from m4ov_kernels.gemm.triton_linear_large import _quantized_linear_large_fwd_kernel
from m4ov_kernels.gemm.triton_linear_layout import BLOCK, Layout, ordered, scale_steps
from m4ov_kernels.gpu import Config, current_device
from m4ov_kernels.layout import as_rows

# Rows of activations up to which a table serves; a tile holds so many.
SIZES = {"few": 16, "some": 64}
# More rows: of bfloat16 (and of eight-bit codes), of four-bit codes that meet others, of gates and ups, which take
# twice the registers.
MANY, MANY_CODES, PAIRS = "many", "many_codes", "pairs"
# Architectures that load tiles by tensor descriptors (TMA), and those without e4m3 as the format means it.
DESCRIPTORS, BITS = ("sm_90", "sm_100"), ("sm_80", "sm_86", "gfx942")
_SPLIT_STEPS = 4  # of K, at least, in a split
_PROGRAMS_PER_PROCESSOR = 2  # without descriptors
_DEQUANTIZED_BYTES = 128 << 20  # of weights that are made at once, for their gradient


@dataclass(frozen=True)
class Operand:
    """Activations as they enter the product: bfloat16, int8, or uint8 of e4m3 ``[M, K]``, and the float32 scales of
    codes, ``[1, M]``, or ``grouped`` ``[⌈K/128⌉, M]``."""

    values: Tensor
    scales: Tensor | None
    grouped: bool = False


def table_of(kind: str, activation: str, rows: int, pairs: bool, descriptors: bool, architecture: str) -> str:
    codes = "int4" if kind == "int4" else "bytes"
    many = PAIRS if pairs and not descriptors else MANY_CODES if codes == "int4" and activation != "bf16" else MANY
    size = next((name for name, most in SIZES.items() if rows <= most), many)
    special = "_gfx" if architecture.startswith("gfx") else "_descriptors" if descriptors else ""
    return f"quantized_linear_{codes}_{size}{special}"


def operand(x: Tensor, layout: Layout, input_scale: Tensor | None, kind: str, activation: str) -> Operand:
    """The activations in the order of the weight's places, rounded."""
    x = ordered(x, layout.order)
    if activation == "bf16":
        return Operand(as_rows(x.to(torch.bfloat16))[0], None)
    (rows, width), float8 = x.shape, activation == "fp8"
    grouped = kind == "fp8" and layout.grouped and input_scale is None
    codes = torch.empty(rows, width, dtype=torch.uint8 if float8 else torch.int8, device=x.device)
    scales = torch.empty(triton.cdiv(width, BLOCK) if grouped else 1, rows, dtype=torch.float32, device=x.device)
    x, x_stride = as_rows(x)
    static = input_scale if float8 else None
    config = configs.get("quantized_linear_input", x)
    with current_device(x):
        _quantized_linear_input_kernel[(rows,)](
            x,
            x_stride,
            scales if static is None else static,
            codes,
            scales,
            rows,
            width,
            FLOAT8=float8,
            GROUPED=grouped,
            STATIC=static is not None,
            **config.options(),
        )
    return Operand(codes, scales, grouped)


def forward(
    x: Operand,
    weight: Layout,
    bias: Tensor | None,
    residual: Tensor | None,
    result: Tensor,
    kind: str,
    activation: str,
    epilogue: str,
) -> None:
    """Of at least one row, into ``result``, contiguous."""
    (rows, width), columns = x.values.shape, weight.codes.shape[0]
    architecture, features = gpu.architecture(result.device), result.shape[1]
    bits = architecture in BITS and "fp8" in (kind, activation)
    codes, values = weight.codes, x.values
    if not bits:
        codes = codes.view(torch.float8_e4m3fn) if kind == "fp8" else codes
        values = values.view(torch.float8_e4m3fn) if activation == "fp8" else values
    bias = None if bias is None else bias.contiguous()
    descriptors = architecture in DESCRIPTORS and not bits and _by_descriptors(x, weight, residual, result, epilogue)
    table = table_of(kind, activation, rows, epilogue == "swiglu", descriptors, architecture)
    config = configs.get(table, result, weight.group if weight.grouped else None)
    sizes = config.constexprs
    if weight.grouped and (weight.group % sizes["BLOCK_K"] or (x.grouped and sizes["BLOCK_K"] != BLOCK)):
        raise ValueError(f"{table}: expected BLOCK_K to divide the group of {weight.group}, got {sizes['BLOCK_K']}")
    after = {"EPILOGUE": EPILOGUES[epilogue], "HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None}
    bias = result if bias is None else bias
    if descriptors:
        _large(x, values, weight, codes, bias, residual, result, config, {"INTEGER": kind == "int8", **after})
        return
    words = kind == "int4" and activation == "bf16" and sizes["BLOCK_K"] >= BLOCK // 2
    if words:
        codes = (codes if codes.data_ptr() % 4 == 0 else codes.clone()).view(torch.int32)
    programs = _processors(result.device) * _PROGRAMS_PER_PROCESSOR
    tiles, splits = triton.cdiv(columns, sizes["BLOCK_N"]) * triton.cdiv(rows, sizes["BLOCK_M"]), 1
    if rows <= max(SIZES.values()):  # by the weight alone: a row keeps its bits among other rows
        splits = max(1, min(triton.cdiv(width, sizes["BLOCK_K"]) // _SPLIT_STEPS, programs // tiles))
    split = splits > 1
    (values, x_stride), (codes, w_stride) = as_rows(values), as_rows(codes)
    residual, residual_stride = (result, 0) if residual is None else as_rows(residual)
    target = result
    if split:
        target = torch.empty(splits, rows, columns, dtype=torch.float32, device=result.device)
    x_unit, w_unit, out_unit = unit(x_stride, width), unit(w_stride, codes.shape[1]), unit(features)
    flags = {
        "KIND": KINDS[kind],
        "ACTIVATION": ACTIVATIONS[activation],
        "SCALED": weight.grouped,
        "X_SCALED": 0 if x.scales is None else 2 if x.grouped else 1,
        "SCALE_ROWS": weight.scale_rows,
        "ZEROS": weight.zeros is not None,
        "BITS": bits,
        "WORDS": words,
        "SPLIT": split,
        **({"EPILOGUE": 0, "HAS_BIAS": False, "HAS_RESIDUAL": False} if split else after),
        "X_UNIT": x_unit,
        "W_UNIT": w_unit,
        "OUT_UNIT": out_unit,
    }
    with current_device(result):
        _quantized_linear_fwd_kernel[(min(tiles * splits, programs),)](
            values,
            x_stride // x_unit,
            target if x.scales is None else x.scales,
            codes,
            w_stride // w_unit,
            weight.scales,
            weight.scale_stride,
            weight.scale_step,
            weight.scales if weight.zeros is None else weight.zeros,
            bias,
            residual,
            residual_stride,
            target,
            features // out_unit,
            rows,
            columns,
            width // x_unit,
            codes.shape[1] // w_unit,
            weight.group // sizes["BLOCK_K"] if weight.grouped else 1,
            splits,
            **flags,
            **config.options(),
        )
        if split:
            merge = configs.get("quantized_linear_merge", result)
            grid = triton.cdiv(rows, merge.constexprs["BLOCK_ROWS"])
            grid *= triton.cdiv(features, merge.constexprs["BLOCK_D"])
            numbers = (rows, columns, features, splits)
            _quantized_linear_merge_kernel[(grid,)](
                target, bias, residual, residual_stride, result, *numbers, **after, **merge.options()
            )


def _large(
    x: Operand,
    values: Tensor,
    weight: Layout,
    codes: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    result: Tensor,
    config: Config,
    flags: dict[str, Any],
) -> None:
    (rows, width), columns, sizes = values.shape, codes.shape[0], config.constexprs
    tokens, numbers, places = sizes["BLOCK_M"], sizes["BLOCK_N"], sizes["BLOCK_K"]
    if weight.grouped and sizes["PARTS"] * numbers > 2 * BLOCK:
        raise ValueError(f"quantized_linear: expected half of the parts in one block of {BLOCK}, got {dict(sizes)}")
    made = TensorDescriptor.from_tensor(result, [tokens, numbers])
    tile = numbers * sizes["PARTS"] // (2 if flags["EPILOGUE"] == EPILOGUES["swiglu"] else 1)
    tiles = triton.cdiv(result.shape[1], tile) * triton.cdiv(rows, tokens)
    with current_device(result):
        _quantized_linear_large_fwd_kernel[(min(tiles, _processors(result.device)),)](
            TensorDescriptor.from_tensor(values, [tokens, places]),
            x.scales,
            TensorDescriptor.from_tensor(codes, [numbers, places]),
            weight.scales,
            weight.scale_stride,
            weight.scale_step,
            bias,
            made if residual is None else TensorDescriptor.from_tensor(residual, [tokens, numbers]),
            made,
            rows,
            columns,
            width,
            SCALED=weight.grouped,
            X_GROUPED=x.grouped,
            **flags,
            **config.options(),
        )


def dequantized(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    kind: str,
    group: int,
    result: Tensor,
    first: int,
) -> None:
    """Of canonical tensors the values of input features ``first`` … into ``result`` ``[N, features]``."""
    columns, width = result.shape
    rows, groups = scale_steps(scales, columns)
    size = BLOCK if kind == "fp8" else group
    config: Config = configs.get("quantized_linear_dequantize", result)
    sizes = config.constexprs
    grid = triton.cdiv(columns, sizes["BLOCK_ROWS"]) * triton.cdiv(width, sizes["BLOCK_D"])
    with current_device(result):
        _quantized_linear_dequantize_kernel[(grid,)](
            codes,
            codes.stride(0),
            scales,
            0 if scales.shape[0] == 1 else scales.stride(0),
            scales if zeros is None else zeros,
            codes if order is None else order,
            result,
            result.stride(0),
            columns,
            width,
            first,
            first + width if groups == 1 else size,
            KIND=KINDS[kind],
            SCALE_ROWS=rows,
            ZEROS=zeros is not None,
            ORDERED=order is not None,
            LARGEST=torch.finfo(result.dtype).max,
            **config.options(),
        )


def features_at_once(columns: int, size: int) -> int:
    """Input features of a weight of ``columns`` rows that are dequantised at once, to elements of ``size`` bytes."""
    return max(BLOCK, _DEQUANTIZED_BYTES // (columns * size) // BLOCK * BLOCK)


def unit(*sizes: int) -> int:
    """The largest of 16, 4 and 1 that divides all: what the compiler may know of lengths and strides."""
    return next(unit for unit in (16, 4, 1) if all(size % unit == 0 for size in sizes))


def _by_descriptors(x: Operand, weight: Layout, residual: Tensor | None, result: Tensor, epilogue: str) -> bool:
    """Many rows, codes of eight bits on both sides, results of 16 bits, whatever a descriptor describes whole and
    aligned, and no tile of weights in two blocks of scales."""
    if result.shape[0] <= max(SIZES.values()) or x.scales is None or weight.codes.shape[1] != x.values.shape[1]:
        return False
    if weight.grouped and epilogue == "swiglu" and result.shape[1] % BLOCK:
        return False
    matrices = (x.values, weight.codes, result, *([] if residual is None else [residual]))
    return result.dtype is not torch.float32 and all(
        t.data_ptr() % 16 == 0
        and t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        and t.stride(0) * t.element_size() % 16 == 0
        for t in matrices
    )


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # interpreted
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

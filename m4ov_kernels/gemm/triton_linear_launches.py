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
from m4ov_kernels.gemm.triton_linear_around import (
    _quantized_linear_dequantize_kernel,
    _quantized_linear_input_kernel,
)
from m4ov_kernels.gemm.triton_linear_kernels import (
    EPILOGUES,
    _quantized_linear_fwd_kernel,
    _quantized_linear_merge_kernel,
)
from m4ov_kernels.gemm.triton_linear_layout import BLOCK, Layout, ordered, scale_steps
from m4ov_kernels.gemm.triton_linear_tiles import ACTIVATIONS, KINDS
from m4ov_kernels.gpu import Config, current_device
from m4ov_kernels.layout import as_rows

# Rows of activations up to which a table serves; a tile holds so many.
SIZES = {"few": 16, "some": 64}
MANY = "many"
# Architectures that load tiles by tensor descriptors (TMA), and those without e4m3 as the format means it.
DESCRIPTORS, BITS = ("sm_90", "sm_100"), ("sm_80", "sm_86", "gfx942")
_SPLIT_STEPS = 4  # of K, at least, in a split
_PROGRAMS_PER_PROCESSOR = {True: 1, False: 2}  # with descriptors and without
_DEQUANTIZED_BYTES = 128 << 20  # of weights that are made at once, for their gradient


@dataclass(frozen=True)
class Operand:
    """Activations as they enter the product: bfloat16, int8, or uint8 of e4m3 ``[M, K]``, and the float32 scales of
    codes, ``[1, M]``, or ``grouped`` ``[⌈K/128⌉, M]``."""

    values: Tensor
    scales: Tensor | None
    grouped: bool = False


def table_of(kind: str, rows: int, descriptors: bool, architecture: str) -> str:
    size = next((name for name, most in SIZES.items() if rows <= most), MANY)
    codes = "int4" if kind == "int4" else "bytes"
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
    architecture = gpu.architecture(result.device)
    descriptors = _by_descriptors(x.values, weight.codes, kind, activation, rows, architecture)
    table = table_of(kind, rows, descriptors, architecture)
    config = configs.get(table, result, weight.group if weight.grouped else None)
    sizes = config.constexprs
    if weight.grouped and (weight.group % sizes["BLOCK_K"] or (x.grouped and sizes["BLOCK_K"] != BLOCK)):
        raise ValueError(f"{table}: expected BLOCK_K to divide the group of {weight.group}, got {sizes['BLOCK_K']}")
    pair = epilogue == "swiglu"
    features = result.shape[1]
    stacked = descriptors and not pair
    tiles = triton.cdiv(features, sizes["BLOCK_N"] * (1 + stacked)) * triton.cdiv(rows, sizes["BLOCK_M"])
    programs = _processors(result.device) * _PROGRAMS_PER_PROCESSOR[descriptors]
    splits = 1
    if rows <= max(SIZES.values()):  # by the weight alone: a row keeps its bits among other rows
        steps = triton.cdiv(width, sizes["BLOCK_K"])
        tiles = triton.cdiv(columns, sizes["BLOCK_N"]) * triton.cdiv(rows, sizes["BLOCK_M"])
        splits = max(1, min(steps // _SPLIT_STEPS, programs // tiles))
    split = splits > 1
    bits = activation == "fp8" or kind == "fp8"
    bits = bits and architecture in BITS
    codes = weight.codes
    words = kind == "int4" and activation == "bf16" and sizes["BLOCK_K"] >= BLOCK // 2
    if words:
        codes = (codes if codes.data_ptr() % 4 == 0 else codes.clone()).view(torch.int32)
    elif kind == "fp8" or activation == "fp8":
        codes = codes if bits or kind != "fp8" else codes.view(torch.float8_e4m3fn)
    values = x.values if bits or activation != "fp8" else x.values.view(torch.float8_e4m3fn)
    (values, x_stride), (codes, w_stride) = as_rows(values), as_rows(codes)
    residual, residual_stride = (result, 0) if residual is None else as_rows(residual)
    target = result
    if split:
        target = torch.empty(splits, rows, columns, dtype=torch.float32, device=result.device)
    x_unit, w_unit, out_unit = unit(x_stride, width), unit(w_stride, codes.shape[1]), unit(features)
    given: list[Any] = [values, codes]
    if descriptors:
        tile = sizes["BLOCK_K"]
        given = [
            TensorDescriptor.from_tensor(values, [sizes["BLOCK_M"], tile]),
            TensorDescriptor.from_tensor(codes, [sizes["BLOCK_N"], tile]),
        ]
    options = {"HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not result}
    bias = result if bias is None else bias.contiguous()
    merged = {"EPILOGUE": EPILOGUES[epilogue], **options}
    flags = {
        "KIND": KINDS[kind],
        "ACTIVATION": ACTIVATIONS[activation],
        "SCALED": weight.grouped,
        "X_SCALED": 0 if x.scales is None else 2 if x.grouped else 1,
        "SCALE_ROWS": weight.scale_rows,
        "ZEROS": weight.zeros is not None,
        "BITS": bits,
        "WORDS": words,
        "DESCRIPTORS": descriptors,
        "SPLIT": split,
        "HALVES": 1 if split or not (descriptors or pair) else 2,
        **(dict.fromkeys(options, False) | {"EPILOGUE": 0} if split else merged),
        "X_UNIT": x_unit,
        "W_UNIT": w_unit,
        "OUT_UNIT": out_unit,
    }
    with current_device(result):
        _quantized_linear_fwd_kernel[(min(tiles * splits, programs),)](
            given[0],
            x_stride // x_unit,
            target if x.scales is None else x.scales,
            given[1],
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
            features if pair and not split else sizes["BLOCK_N"],
            weight.group // sizes["BLOCK_K"] if weight.grouped else 1,
            splits,
            **flags,
            **config.options(),
        )
        if split:
            merge = configs.get("quantized_linear_merge", result)
            grid = triton.cdiv(rows, merge.constexprs["BLOCK_ROWS"])
            grid *= triton.cdiv(features, merge.constexprs["BLOCK_D"])
            _quantized_linear_merge_kernel[(grid,)](
                target,
                bias,
                residual,
                residual_stride,
                result,
                rows,
                columns,
                features,
                splits,
                **merged,
                **merge.options(),
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


def _by_descriptors(x: Tensor, codes: Tensor, kind: str, activation: str, rows: int, architecture: str) -> bool:
    """Codes of eight bits on both sides, and many rows."""
    if architecture not in DESCRIPTORS or kind == "int4" or activation == "bf16" or rows <= max(SIZES.values()):
        return False
    return all(t.data_ptr() % 16 == 0 and t.stride(1) == 1 and t.stride(0) % 16 == 0 for t in (x, codes))


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # interpreted
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

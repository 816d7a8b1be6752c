"""The Triton kernels of ``quantized_linear``; ``triton_linear_launches.py`` launches them.

A tile of the result is made transposed, weights on the left: the matrix units take 64 or more rows there and any
number of columns, so that one token wastes little, and codes go from memory to registers to the unit. What is summed in
one accumulator has one scale: sums of integers, or of products of e4m3 values over 128 of K, are scaled and added up in
float32 (e4m3's are added up so in any case: Hopper's units keep fewer bits of a sum than float32 has). Sums meet the
scale of the activations before that of the weights: their product alone may leave float32's range.

Work is cut by the configuration and by the number of processors, never by which rows there are; where K is split, the
parts are written and added in order: no bit of a row depends on its company, and nothing is added atomically.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m4ov_kernels.activation.triton_kernels import _activate
from m4ov_kernels.gemm.options import EPILOGUES
from m4ov_kernels.gemm.triton_linear_tiles import (
    FP8,
    INT4,
    INT8,
    _activations,
    _codes,
    _codes_of_words,
    _values,
)

_GELU, _GELU_TANH, _SWIGLU = (tl.constexpr(EPILOGUES[name]) for name in ("gelu", "gelu_tanh", "swiglu"))
_FREE = [
    "x_stride",
    "weight_stride",
    "scale_stride",
    "scale_step",
    "residual_stride",
    "out_stride",
    "rows",
    "columns",
    "width",
    "weight_width",
    "group_steps",
    "splits",
]


@triton.jit
def _place(tile, blocks_n, blocks_m, GROUP: tl.constexpr):
    """Blocks of weights and of tokens: ``GROUP`` blocks of weights at a time, so that programs which run together read
    few rows of either, out of L2."""
    group = tile // (GROUP * blocks_m)
    size = tl.minimum(blocks_n - group * GROUP, GROUP)
    inside = tile - group * GROUP * blocks_m
    return group * GROUP + inside % size, inside // size


@triton.jit
def _added(
    total,
    x,
    weight,
    number,
    step,
    weight_width,
    scale_ptr,
    scale_stride,
    scale_step,
    zero_ptr,
    group,
    x_scale,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
    X_SCALED: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    ZEROS: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``total`` and the products of one step of K; ``number``: of the weight's rows."""
    zero = tl.full([BLOCK_N], 8, tl.int32)
    if ZEROS:
        zero = tl.load(zero_ptr + number * scale_stride + group * scale_step).to(tl.int32)
    w_scale = tl.zeros([BLOCK_N], tl.float32)
    if SCALED:  # asked for before the products, which take longer
        w_scale = tl.load(scale_ptr + (number // SCALE_ROWS) * scale_stride + group * scale_step).to(tl.float32)
    units: tl.constexpr = BLOCK_K // (8 if WORDS else (2 if KIND == INT4 else 1))
    col = step * units + tl.arange(0, units)
    loaded = tl.load(weight + col[None, :], mask=(col < weight_width)[None, :], other=0.0)
    if WORDS:
        part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32) if SCALED else total
        for i in tl.static_range(4):
            part = tl.dot(_codes_of_words(loaded, zero, i, BLOCK_N, BLOCK_K), x[i], part, input_precision="ieee")
        if SCALED:
            total = tl.fma(part, w_scale[:, None], total)
        else:
            total = part
    else:
        if KIND == INT4:
            left = _codes(loaded, zero, ACTIVATION, BITS, BLOCK_N, BLOCK_K)
        else:
            left = _values(loaded, KIND, ACTIVATION, BITS)
        if SCALED:
            part = _unbiased(tl.dot(left, x[0], input_precision="ieee").to(tl.float32), KIND, ACTIVATION, BITS)
            if X_SCALED:
                part *= x_scale[None, :]
            total = tl.fma(part, w_scale[:, None], total)
        elif ACTIVATION == FP8:
            total += tl.dot(left, x[0], input_precision="ieee")
        else:
            total = tl.dot(left, x[0], total, out_dtype=total.dtype, input_precision="ieee")
    return total


@triton.jit
def _unbiased(part, KIND: tl.constexpr, ACTIVATION: tl.constexpr, BITS: tl.constexpr):
    if BITS and ACTIVATION == FP8:
        part *= 65536.0 if KIND == FP8 else 256.0
    return part


@triton.jit
def _scaled(
    total,
    x_scale,
    number,
    scale_ptr,
    scale_stride,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
    X_SCALED: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    BITS: tl.constexpr,
):
    """Sums that have one scale along K, times their scales."""
    if not SCALED:
        total = _unbiased(total.to(tl.float32), KIND, ACTIVATION, BITS)
        if X_SCALED:
            total *= x_scale[None, :]
        scale = tl.load(scale_ptr + (number // SCALE_ROWS) * tl.cast(scale_stride, tl.int64))
        total *= scale.to(tl.float32)[:, None]
    return total


@triton.jit
def _applied(first, second, EPILOGUE: tl.constexpr):
    if EPILOGUE == _SWIGLU:
        return _activate(first, 0) * second
    elif EPILOGUE == _GELU:
        return _activate(first, 2)
    elif EPILOGUE == _GELU_TANH:
        return _activate(first, 1)
    else:
        return first


@triton.jit
def _finish(
    first,
    second,
    row,
    number,
    inside,
    bias_ptr,
    residual_ptr,
    residual_stride,
    features,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Results in float32 of finished sums, of tokens ``row`` and features ``number`` (of the result), which broadcast
    to the tile's shape; ``second``: the ups of gates."""
    if HAS_BIAS:
        first += tl.load(bias_ptr + number, mask=inside, other=0.0).to(tl.float32)
        if EPILOGUE == _SWIGLU:
            second += tl.load(bias_ptr + features + number, mask=inside, other=0.0).to(tl.float32)
    first = _applied(first, second, EPILOGUE)
    if HAS_RESIDUAL:
        first += tl.load(residual_ptr + row * residual_stride + number, mask=inside, other=0.0).to(tl.float32)
    return first


@triton.jit(do_not_specialize=_FREE)
def _quantized_linear_fwd_kernel(
    x,  # [rows, width]: bf16, int8, e4m3 (with BITS their bits)
    x_stride,  # in X_UNIT
    x_scale_ptr,  # fp32 [steps of K with X_SCALED 2, else 1, rows], or unused
    weight,  # [columns, weight_width]: codes (int4: bytes of two, or words of eight)
    weight_stride,  # in W_UNIT
    scale_ptr,  # of a weight row (or SCALE_ROWS of them) and a group
    scale_stride,
    scale_step,
    zero_ptr,  # uint8, laid out as the scales, or unused
    bias_ptr,  # [columns], or unused
    residual_ptr,  # as the result, or unused
    residual_stride,
    out_ptr,  # [rows, features], or with SPLIT fp32 [splits, rows, columns]
    out_stride,  # in OUT_UNIT
    rows,
    columns,  # rows of the weight
    width,  # in X_UNIT
    weight_width,  # in W_UNIT
    group_steps,  # steps of K that share a scale
    splits,  # of K
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,  # the weight's scale changes along K
    X_SCALED: tl.constexpr,  # 0, 1 or 2
    SCALE_ROWS: tl.constexpr,
    ZEROS: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    SPLIT: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    X_UNIT: tl.constexpr,
    W_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    width *= X_UNIT
    weight_width *= W_UNIT
    pair: tl.constexpr = EPILOGUE == _SWIGLU
    features = columns // 2 if pair else columns
    blocks_n = tl.cdiv(features, BLOCK_N)
    blocks_m = tl.cdiv(rows, BLOCK_M)
    steps = tl.cdiv(width, BLOCK_K)
    tl.assume(steps > 0)  # else the loops around would be compiled twice
    integer: tl.constexpr = ACTIVATION == INT8 and not SCALED
    sums: tl.constexpr = tl.int32 if integer else tl.float32
    for unit in tl.range(tl.program_id(0), blocks_n * blocks_m * splits, tl.num_programs(0)):
        block_n, block_m = _place(unit // splits, blocks_n, blocks_m, GROUP)
        split = unit % splits
        begin = 0
        end = steps
        if SPLIT:
            begin = split * steps // splits
            end = (split + 1) * steps // splits
        n = block_n * BLOCK_N
        m = block_m * BLOCK_M
        # Rows past the end repeat the last one: what they make is never stored.
        token = tl.minimum(m + tl.arange(0, BLOCK_M), rows - 1)
        number = tl.minimum(n + tl.arange(0, BLOCK_N), columns - 1)
        stride = tl.cast(weight_stride, tl.int64) * W_UNIT
        left = weight + number[:, None] * stride
        if pair:
            other = tl.minimum(n + features + tl.arange(0, BLOCK_N), columns - 1)
            left_other = weight + other[:, None] * stride
        right = x + token[:, None] * (tl.cast(x_stride, tl.int64) * X_UNIT)
        x_scales = x_scale_ptr + token
        x_scale = tl.zeros([BLOCK_M], tl.float32)
        if X_SCALED == 1:
            x_scale = tl.load(x_scales)
        first = tl.zeros([BLOCK_N, BLOCK_M], sums)
        second = tl.zeros([BLOCK_N, BLOCK_M], sums)
        for step in range(begin, end):
            group = step // group_steps if SCALED else 0
            if X_SCALED == 2:
                x_scale = tl.load(x_scales + step * tl.cast(rows, tl.int64))
            col = step * BLOCK_K + tl.arange(0, BLOCK_K)
            tile = tl.load(right + col[None, :], mask=(col < width)[None, :], other=0.0)
            operands = _activations(tile, ACTIVATION, BITS, WORDS)
            first = _added(
                first,
                operands,
                left,
                number,
                step,
                weight_width,
                scale_ptr,
                tl.cast(scale_stride, tl.int64),
                scale_step,
                zero_ptr,
                group,
                x_scale,
                KIND,
                ACTIVATION,
                SCALED,
                X_SCALED,
                SCALE_ROWS,
                ZEROS,
                BITS,
                WORDS,
                BLOCK_N,
                BLOCK_M,
                BLOCK_K,
            )
            if pair:
                second = _added(
                    second,
                    operands,
                    left_other,
                    other,
                    step,
                    weight_width,
                    scale_ptr,
                    tl.cast(scale_stride, tl.int64),
                    scale_step,
                    zero_ptr,
                    group,
                    x_scale,
                    KIND,
                    ACTIVATION,
                    SCALED,
                    X_SCALED,
                    SCALE_ROWS,
                    ZEROS,
                    BITS,
                    WORDS,
                    BLOCK_N,
                    BLOCK_M,
                    BLOCK_K,
                )
        first = _scaled(
            first, x_scale, number, scale_ptr, scale_stride, KIND, ACTIVATION, SCALED, X_SCALED, SCALE_ROWS, BITS
        )
        if pair:
            second = _scaled(
                second, x_scale, other, scale_ptr, scale_stride, KIND, ACTIVATION, SCALED, X_SCALED, SCALE_ROWS, BITS
            )
        row = tl.cast(m, tl.int64) + tl.arange(0, BLOCK_M)[None, :]
        feature = n + tl.arange(0, BLOCK_N)[:, None]
        inside = (row < rows) & (feature < features)
        if SPLIT:
            place = (tl.cast(split, tl.int64) * rows + row) * columns
            tl.store(out_ptr + place + feature, first, mask=inside)
        else:
            place = row * (tl.cast(out_stride, tl.int64) * OUT_UNIT)
            made = _finish(
                first,
                second,
                row,
                feature,
                inside,
                bias_ptr,
                residual_ptr,
                residual_stride,
                features,
                EPILOGUE,
                HAS_BIAS,
                HAS_RESIDUAL,
            )
            tl.store(out_ptr + place + feature, made.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["residual_stride", "rows", "columns", "features", "splits"])
def _quantized_linear_merge_kernel(
    partial_ptr,  # fp32 [splits, rows, columns]
    bias_ptr,  # [columns], or unused
    residual_ptr,  # [rows, features], or unused
    residual_stride,
    out_ptr,  # [rows, features]
    rows,
    columns,
    features,  # of the result: half of the columns with SWIGLU
    splits,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The parts of K added in order, and what follows."""
    blocks = tl.cdiv(features, BLOCK_D)
    program = tl.program_id(0)
    row = tl.cast(program // blocks, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    feature = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = (row < rows) & (feature < features)
    first = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    second = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for split in range(splits):
        part = partial_ptr + (tl.cast(split, tl.int64) * rows + row) * columns + feature
        first += tl.load(part, mask=inside, other=0.0)
        if EPILOGUE == _SWIGLU:
            second += tl.load(part + features, mask=inside, other=0.0)
    made = _finish(
        first,
        second,
        row,
        feature,
        inside,
        bias_ptr,
        residual_ptr,
        residual_stride,
        features,
        EPILOGUE,
        HAS_BIAS,
        HAS_RESIDUAL,
    )
    tl.store(out_ptr + row * features + feature, made.to(out_ptr.dtype.element_ty), mask=inside)

"""Every compilation of the Triton kernels of ``quantized_linear`` that ships."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from m4ov_kernels import configs
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
from m4ov_kernels.gemm.triton_linear_launches import BITS, DESCRIPTORS, MANY, MANY_CODES, PAIRS, SIZES
from m4ov_kernels.gpu import DTYPES, Build, Config, Work
from m4ov_kernels.gpu import SIZES as BYTES

# Kind, activation, whether the weight's scale changes along K.
MODES = {
    "W4A16": ("int4", "bf16", True),
    "W4A8-fp8": ("int4", "fp8", True),
    "W4A8-int8": ("int4", "int8", True),
    "W8A8": ("int8", "int8", False),
    "fp8": ("fp8", "fp8", False),
    "fp8 block": ("fp8", "fp8", True),
    "fp8 weights": ("fp8", "bf16", False),
    "fp8 block weights": ("fp8", "bf16", True),
}
# What else a call may ask for, declared of these modes: at many rows, and of one split of few.
VARIANTS: dict[str, dict[str, Any]] = {
    "zeros": {"ZEROS": True},
    "bias, residual": {"HAS_BIAS": True, "HAS_RESIDUAL": True},
    "gelu": {"EPILOGUE": EPILOGUES["gelu"], "HAS_BIAS": True},
    "gelu_tanh": {"EPILOGUE": EPILOGUES["gelu_tanh"], "HAS_BIAS": True},
    "swiglu": {"EPILOGUE": EPILOGUES["swiglu"]},
}
VARIED = ("W4A16", "fp8 block")
LARGE = ("W8A8", "fp8", "fp8 block")  # by descriptors
MERGES: dict[str, dict[str, Any]] = {
    "": {},
    "bias, residual": {"HAS_BIAS": True, "HAS_RESIDUAL": True},
    "gelu": {"EPILOGUE": EPILOGUES["gelu"], "HAS_BIAS": True},
    "gelu_tanh": {"EPILOGUE": EPILOGUES["gelu_tanh"], "HAS_BIAS": True},
    "swiglu": {"EPILOGUE": EPILOGUES["swiglu"]},
}
_PLAIN = {"ZEROS": False, "EPILOGUE": 0, "HAS_BIAS": False, "HAS_RESIDUAL": False}


def _work(kind: str, activation: str, rows: int) -> Work:
    """Each operand and the result once: of the block GEMM of DeepSeek's size, or of few rows of Qwen3-VL-8B's."""
    columns, width = (7168, 16384) if rows > max(SIZES.values()) else (12288, 4096)
    codes = columns * width // (2 if kind == "int4" else 1)
    codes += 2 * columns * (width // 128 if kind == "int4" else 1)
    moved = codes + rows * (width * (2 if activation == "bf16" else 1) + 2 * columns)
    return Work(f"[{rows}, {width}] × [{columns}, {width}]", moved, 2 * rows * columns * width)


def _signature(kind: str, activation: str, flags: dict[str, Any], out: str) -> str:
    """``out``: the type of the result; scales of int4 are in bf16, as checkpoints have them, others in fp32."""
    float8 = "u8" if flags["BITS"] else "fp8e4nv"
    x = {"bf16": "bf16", "int8": "i8", "fp8": float8}[activation]
    codes = {"int4": "i32" if flags["WORDS"] else "u8", "int8": "i8", "fp8": float8}[kind]
    target = "*fp32/16" if flags["SPLIT"] else f"*{out}/16"
    x_scale = "*fp32/16" if flags["X_SCALED"] else target
    scale = "*bf16/16" if kind == "int4" else "*fp32/16"
    zero = "*u8/16" if flags["ZEROS"] else scale
    rest = f"*{out}/16 *{out}/16 i32 {target} i32"
    return f"*{x}/16 i32 {x_scale} *{codes}/16 i32 {scale} i32 i32 {zero} {rest} i32 i32 i32 i32 i32 i32"


def _flags(kind: str, activation: str, scaled: bool, bits: bool, config: Config, split: bool) -> dict[str, Any]:
    return {
        "KIND": KINDS[kind],
        "ACTIVATION": ACTIVATIONS[activation],
        "SCALED": scaled,
        "X_SCALED": 0 if activation == "bf16" else 2 if kind == "fp8" and scaled else 1,
        "SCALE_ROWS": 128 if kind == "fp8" and scaled else 1,
        "BITS": bits,
        "WORDS": kind == "int4" and activation == "bf16" and config.constexprs["BLOCK_K"] >= 64,
        "SPLIT": split,
        "X_UNIT": 16,
        "W_UNIT": 16,
        "OUT_UNIT": 16,
    }


def _products() -> Iterator[Build]:
    for codes in ("int4", "bytes"):
        for size in (*SIZES, MANY, PAIRS, *([MANY_CODES] if codes == "int4" else [])):
            for special in ("", "_gfx"):
                table = f"quantized_linear_{codes}_{size}{special}"
                for out in BYTES:
                    for row, targets in configs.shipped(table, out):
                        served = tuple(t for t in targets if t.startswith("gfx") == bool(special))
                        for mode, (kind, _, _) in MODES.items():
                            both = MODES[mode][1] != "bf16"  # codes on both sides
                            wanted = {MANY: kind != "int4" or not both, MANY_CODES: both}.get(size, True)
                            if (codes == "int4") == (kind == "int4") and wanted:
                                yield from _of_mode(size, row, mode, out, served, not special)


def _of_mode(
    size: str, row: configs.Row, mode: str, out: str, targets: tuple[str, ...], nvidia: bool
) -> Iterator[Build]:
    kind, activation, _ = MODES[mode]
    float8, whole = "fp8" in (kind, activation), row.width is None and nvidia
    for bits in (False, True):
        served = tuple(t for t in targets if bits == (float8 and t in BITS))
        build = partial(_product, size, row, mode, out, bits, served)
        if not served:
            continue
        if size == PAIRS:
            if out == "bf16" and mode in ("W4A16", "W4A8-fp8", "fp8 block") and (row.width is None or mode == "W4A16"):
                yield build("swiglu", False, **VARIANTS["swiglu"])
            continue
        if out != "bf16":
            if whole and mode in VARIED and size == MANY:
                yield build("", False)
            continue
        if row.width is None or mode == "W4A16" or (size == MANY_CODES and mode == "W4A8-fp8"):
            yield build("", size in SIZES)
        varied = whole and mode in VARIED and (size == MANY or (size == "few" and mode == "W4A16"))
        if varied and size != MANY:
            yield build("", False)
        for note, more in VARIANTS.items() if varied else ():
            if not (kind == "fp8" and "ZEROS" in more) and not (note == "swiglu" and size == MANY):
                yield build(note, False, **more)
        if size == MANY and whole and kind != "int4":  # of vision towers: 3420, and odd ones
            yield build("widths of 4", False, X_UNIT=4, W_UNIT=4)
            yield build("any width", False, hot=False, X_UNIT=1, W_UNIT=1, OUT_UNIT=1)


def _product(
    size: str,
    row: configs.Row,
    mode: str,
    out: str,
    bits: bool,
    targets: tuple[str, ...],
    note: str,
    split: bool,
    *,
    hot: bool = True,
    **more: Any,
) -> Build:
    config, (kind, activation, scaled) = row.config, MODES[mode]
    flags = {**_flags(kind, activation, scaled, bits, config, split), **_PLAIN, **more}
    group = f"groups of {row.width}" if row.width else ""
    parts = (mode, size, group, f"to {out}" * (out != "bf16"), "split" * split, note)
    return Build(
        _quantized_linear_fwd_kernel,
        "bf16" if activation == "bf16" else "fp8",  # of the products, for the limit; int8's rate is fp8's
        _signature(kind, activation, flags, out),
        {**flags, **config.constexprs},
        config.num_warps,
        config.num_stages,
        hot=hot,
        note=", ".join(part for part in parts if part),
        work=_work(kind, activation, SIZES.get(size, 4096)),
        matrix=True,
        targets=targets,
    )


def _large() -> Iterator[Build]:
    table = f"quantized_linear_bytes_{MANY}_descriptors"
    for out in ("bf16", "fp16"):
        for row, targets in configs.shipped(table, out):
            for mode in LARGE:
                for note, more in {"": {}, **VARIANTS}.items() if out == "bf16" else [("", {})]:
                    if "ZEROS" not in more:
                        served = tuple(t for t in targets if t in DESCRIPTORS)
                        yield _large_build(row.config, mode, out, note, more, served)


def _large_build(
    config: Config, mode: str, out: str, note: str, more: dict[str, Any], targets: tuple[str, ...]
) -> Build:
    kind, activation, scaled = MODES[mode]
    codes = "i8" if kind == "int8" else "fp8e4nv"
    sizes = config.constexprs

    def tiles(dtype: str, rows: str, columns: str) -> str:
        return f"tensordesc<{dtype}[{sizes[rows]},{sizes[columns]}]>"

    x, weight = tiles(codes, "BLOCK_M", "BLOCK_K"), tiles(codes, "BLOCK_N", "BLOCK_K")
    made = tiles(out, "BLOCK_M", "BLOCK_N")
    flags = {"INTEGER": kind == "int8", "SCALED": scaled, "X_GROUPED": scaled, **_PLAIN, **more}
    del flags["ZEROS"]
    return Build(
        _quantized_linear_large_fwd_kernel,
        "fp8",
        f"{x} *fp32/16 {weight} *fp32/16 i32 i32 *{out}/16 {made} {made} i32 i32 i32",
        {**flags, **sizes},
        config.num_warps,
        config.num_stages,
        note=", ".join(part for part in (mode, f"to {out}" * (out != "bf16"), note) if part),
        work=_work(kind, activation, 4096),
        matrix=True,
        targets=targets,
    )


def _around() -> Iterator[Build]:
    rows, width, columns = 4096, 4096, 12288
    for dtype, size in BYTES.items():
        for row, _ in configs.shipped("quantized_linear_input", dtype):
            for note, options in INPUTS.items():
                codes = "*u8/16" if options["FLOAT8"] else "*i8/16"
                yield Build(
                    _quantized_linear_input_kernel,
                    dtype,
                    f"*T/16 i32 *fp32/16 {codes} *fp32/16 i32 i32",
                    {**options, **row.config.constexprs},
                    row.config.num_warps,
                    row.config.num_stages,
                    note=note,
                    work=Work(f"[{rows}, {width}]", rows * (width * (size + 1) + 4), 4 * rows * width),
                )
        for row, _ in configs.shipped("quantized_linear_merge", dtype):
            for note, more in MERGES.items() if dtype == "bf16" else [("", {})]:
                flags = {"EPILOGUE": 0, "HAS_BIAS": False, "HAS_RESIDUAL": False, **more}
                splits, count = 4, SIZES["few"] * columns
                yield Build(
                    _quantized_linear_merge_kernel,
                    dtype,
                    "*fp32/16 *T/16 *T/16 i32 *T/16 i32 i32 i32 i32",
                    {**flags, **row.config.constexprs},
                    row.config.num_warps,
                    row.config.num_stages,
                    note=note,
                    work=Work(f"[{splits}, {count}]", count * (4 * splits + size), splits * count),
                )
    for dtype in ("bf16", "fp32"):
        for row, _ in configs.shipped("quantized_linear_dequantize", dtype):
            for note, (codes, scales, options) in DEQUANTIZED.items():
                zero, order = ("*u8/16" if options["ZEROS"] else scales), ("*i32/16" if options["ORDERED"] else codes)
                largest = torch.finfo({name: dtype for dtype, name in DTYPES.items()}[dtype]).max
                yield Build(
                    _quantized_linear_dequantize_kernel,
                    dtype,
                    f"{codes} i32 {scales} i32 {zero} {order} *T/16 i32 i32 i32 i32 i32",
                    {**options, "LARGEST": largest, **row.config.constexprs},
                    row.config.num_warps,
                    row.config.num_stages,
                    note=note,
                    work=Work(f"[{columns}, {width}]", columns * width * (1 + BYTES[dtype]), 2 * columns * width),
                )


INPUTS: dict[str, dict[str, bool]] = {
    "int8": {"FLOAT8": False, "GROUPED": False, "STATIC": False},
    "e4m3": {"FLOAT8": True, "GROUPED": False, "STATIC": False},
    "e4m3 of 128": {"FLOAT8": True, "GROUPED": True, "STATIC": False},
    "e4m3, static": {"FLOAT8": True, "GROUPED": False, "STATIC": True},
}
DEQUANTIZED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "int4": ("*u8/16", "*bf16/16", {"KIND": 0, "SCALE_ROWS": 1, "ZEROS": False, "ORDERED": False}),
    "int4, zeros, act-order": ("*u8/16", "*bf16/16", {"KIND": 0, "SCALE_ROWS": 1, "ZEROS": True, "ORDERED": True}),
    "int8": ("*i8/16", "*fp32/16", {"KIND": 1, "SCALE_ROWS": 1, "ZEROS": False, "ORDERED": False}),
    "fp8": ("*u8/16", "*fp32/16", {"KIND": 2, "SCALE_ROWS": 1, "ZEROS": False, "ORDERED": False}),
    "fp8 block": ("*u8/16", "*fp32/16", {"KIND": 2, "SCALE_ROWS": 128, "ZEROS": False, "ORDERED": False}),
}
KERNELS = [*_products(), *_large(), *_around()]

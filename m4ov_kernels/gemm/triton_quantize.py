"""The quantisations of activations in Triton, for CUDA and ROCm (and, interpreted, for CPU tensors): launches and
declarations. ``configs`` chooses by dtype and width alone, so that a row's bits do not depend on how many there are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from m4ov_kernels import configs
from m4ov_kernels.activation.triton import swiglu_fwd
from m4ov_kernels.gemm.quantize import scale_shape
from m4ov_kernels.gemm.reference_quantize import BLOCK, CODES
from m4ov_kernels.gemm.triton_quantize_kernels import (
    _quantize_tiles_kernel,
    _quantize_wide_kernel,
    _swiglu_quantize_kernel,
)
from m4ov_kernels.gpu import SIZES, Build, Config, Work, current_device
from m4ov_kernels.layout import NUMERICS, as_rows, output
from m4ov_kernels.norm.triton import rms_norm_fwd

__all__ = ["KERNELS", "quantize_fp8_fwd", "quantize_int8_fwd", "rms_norm_quantize_fwd", "swiglu_quantize_fwd"]


def quantize_int8_fwd(input: Tensor, *, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """``(codes int8 [..., K], scales float32 [..., 1])``."""
    codes, scales = _outputs(input, "int8", out)
    _quantize(codes, scales, None, input, "row")
    return codes, scales


def quantize_fp8_fwd(
    input: Tensor, granularity: str, transposed: bool, *, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(values, scales, transposed values or an empty tensor)``."""
    values, scales = _outputs(input, "fp8", out, granularity)
    shape = (input.shape[-1], input.shape[:-1].numel()) if transposed else (0,)
    turned = output(out and out[2], shape, input, values.dtype)
    _quantize(values, scales, turned if transposed else None, input, granularity)
    return values, scales, turned


def rms_norm_quantize_fwd(
    hidden_states: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    numerics: str,
    dtype: str,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(codes, scales, sum)``; the sum is empty without ``residual``. Two kernels: the order in which a compiler adds
    up a row is its own, and these bits are to be the norm's."""
    codes, scales = _outputs(hidden_states, dtype, out)
    normed, total, _ = rms_norm_fwd(hidden_states, weight, residual, eps, numerics)
    _quantize(codes, scales, None, normed, "row")
    return codes, scales, total if out is None else out[2].copy_(total)


def swiglu_quantize_fwd(
    gate: Tensor, up: Tensor, numerics: str, dtype: str, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """``(codes, scales)``; of rows wider than every configuration by two kernels."""
    codes, scales = _outputs(gate, dtype, out)
    width = gate.shape[-1]
    rows = gate.numel() // width
    config = _whole("swiglu_quantize", gate, width)
    if config is None:
        _quantize(codes, scales, None, swiglu_fwd(gate, up, numerics), "row")
    elif rows:
        flags = {"NUMERICS": NUMERICS[numerics], "FLOAT8": dtype == "fp8", **config.options()}
        operands = (*as_rows(gate), *as_rows(up), codes.view(torch.int8), scales, rows, width)
        with current_device(gate):
            _swiglu_quantize_kernel[(triton.cdiv(rows, config.constexprs["BLOCK_ROWS"]),)](*operands, **flags)
    return codes, scales


def _outputs(
    input: Tensor, dtype: str, out: tuple[Tensor, ...] | None, granularity: str = "row"
) -> tuple[Tensor, Tensor]:
    given = (None, None) if out is None else (out[0], out[1])
    codes = output(given[0], input.shape, input, CODES[dtype])
    return codes, output(given[1], scale_shape(input.shape, granularity), input, torch.float32)


def _whole(kernel: str, tensor: Tensor, width: int) -> Config | None:
    config = configs.find(kernel, tensor, width)
    if config and config.constexprs["BLOCK_D"] < width:
        raise ValueError(f"configuration of {kernel} at {width}: expected BLOCK_D to hold the row, got {config}")
    return config


def _quantize(codes: Tensor, scales: Tensor, turned: Tensor | None, input: Tensor, granularity: str) -> None:
    width = input.shape[-1]
    rows = input.numel() // width
    if rows == 0:
        return
    float8 = codes.dtype is not torch.int8
    input, stride = as_rows(input)
    bytes = codes.view(torch.int8)
    table = f"quantize_{granularity}s"
    config = _whole(table, input, width) if granularity == "row" else configs.get(table, input)
    with current_device(input):
        if config is None:
            wide = configs.get("quantize_rows_wide", input)
            _quantize_wide_kernel[(rows,)](input, stride, bytes, scales, width, FLOAT8=float8, **wide.options())
            return
        side = config.constexprs["BLOCK_D"]
        down = config.constexprs["BLOCK_ROWS"]
        if (granularity != "row" and side != BLOCK) or (granularity == "block" and down != BLOCK):
            raise ValueError(f"configuration of {table}: expected blocks of {BLOCK}, got {config}")
        blocks = triton.cdiv(rows, down) * triton.cdiv(width, side)
        flags = {"FLOAT8": float8, "BLOCKS": granularity == "block", "TURNED": turned is not None}
        operands: tuple[Any, ...] = (input, stride, bytes, bytes if turned is None else turned.view(torch.int8), scales)
        _quantize_tiles_kernel[(blocks,)](*operands, rows, width, **flags, **config.options())


_ROWS, _WIDE = 4096, 16384  # of the problems that the cost models state


def _work(width: int, dtype: str, inputs: int, scales: int, codes: int = 1) -> Work:
    """Reads the inputs, writes codes and scales; a magnitude, a maximum, a division and a rounding each."""
    count = _ROWS * width
    return Work(f"[{_ROWS}, {width}]", count * (inputs * SIZES[dtype] + codes) + 4 * scales, (5 * inputs - 1) * count)


def _declared() -> list[Build]:
    builds: list[Build] = []

    def declare(kernel: Any, dtype: str, signature: str, table: str, note: str, work: Any, **flags: Any) -> None:
        for row, targets in configs.shipped(table, dtype):
            config, width = row.config, row.width or (_WIDE if "wide" in table else 4096)
            title = f"D {row.width}, {note}" if row.width else note
            constexprs = {**flags, **config.constexprs}
            stages = (config.num_warps, config.num_stages)
            builds.append(
                Build(kernel, dtype, signature, constexprs, *stages, note=title, work=work(width), targets=targets)
            )

    tiles, wide = "*T/16 i32/16 *i8/16 *i8/16 *fp32/16 i32 i32/16", "*T/16 i32/16 *i8/16 *fp32/16 i32/16"
    gated = "*T/16 i32/16 *T/16 i32/16 *i8/16 *fp32/16 i32 i32/16"
    for dtype in SIZES:
        one = lambda width, dtype=dtype: _work(width, dtype, 1, _ROWS)  # noqa: E731
        two = lambda width, dtype=dtype: _work(width, dtype, 2, _ROWS)  # noqa: E731
        many = lambda width, dtype=dtype: _work(width, dtype, 1, _ROWS * width // BLOCK)  # noqa: E731
        few = lambda width, dtype=dtype: _work(width, dtype, 1, _ROWS * width // BLOCK**2)  # noqa: E731
        both = lambda width, dtype=dtype: _work(width, dtype, 1, _ROWS * width // BLOCK**2, 2)  # noqa: E731
        for name, float8 in (("int8", False), ("fp8", True)):
            flags = {"FLOAT8": float8, "BLOCKS": False, "TURNED": False}
            declare(_quantize_tiles_kernel, dtype, tiles, "quantize_rows", f"{name} rows", one, **flags)
            declare(_quantize_wide_kernel, dtype, wide, "quantize_rows_wide", f"{name}, wide", one, FLOAT8=float8)
            for numerics in ("hf", "fp32") if dtype == "bf16" else ("hf",):
                options = {"NUMERICS": NUMERICS[numerics], "FLOAT8": float8}
                declare(_swiglu_quantize_kernel, dtype, gated, "swiglu_quantize", f"{name}, {numerics}", two, **options)
        flags = {"FLOAT8": True, "BLOCKS": False, "TURNED": False}
        declare(_quantize_tiles_kernel, dtype, tiles, "quantize_groups", "groups", many, **flags)
        for turned, work in ((False, few), (True, both)):
            flags = {"FLOAT8": True, "BLOCKS": True, "TURNED": turned}
            note = "blocks" + ", transposed too" * turned
            declare(_quantize_tiles_kernel, dtype, tiles, "quantize_blocks", note, work, **flags)
    return builds


KERNELS = _declared()

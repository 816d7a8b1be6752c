"""Tunable kernels of the quantisations of activations. Groups and blocks have the sizes of what shares a scale."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from m4ov_bench.tunables.problem import Problem, Size, Tunable, blocks, poison, randn, whole_rows
from m4ov_kernels.activation import triton as activation
from m4ov_kernels.gemm import reference
from m4ov_kernels.gemm import triton as gemm


def _rows(gated: bool) -> Callable[[int, torch.dtype, torch.device, Size], Problem]:
    def problem(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
        rows = max(2, size.elements // width)
        inputs = tuple(randn((rows, width), dtype, device) for _ in range(1 + gated))
        # Of what our own activation makes: the next bfloat16 is another code.
        x = activation.swiglu_fwd(*inputs, "hf") if gated else inputs[0]
        codes = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=device)
        scales = torch.empty(rows, 1, device=device)

        def run() -> None:
            if gated:
                gemm.swiglu_quantize_fwd(*inputs, "hf", "fp8", out=(codes, scales))
            else:
                gemm.quantize_fp8_fwd(*inputs, "row", False, out=(codes, scales, codes.new_empty(0)))

        def values(codes: Tensor, scales: Tensor) -> Tensor:
            return codes.float() * scales

        expected = values(*reference.quantize_fp8(x, "row", False)[:2])
        return Problem(
            lambda: poison([scales]), run, lambda: [values(codes, scales)], ("values",), [expected], [expected.double()]
        )

    return problem


TUNABLES = (
    Tunable("quantize_rows", whole_rows, _rows(False)),
    Tunable("quantize_rows_wide", blocks("BLOCK_D", 1024, 2048, 4096, 8192), _rows(False)),
    Tunable("swiglu_quantize", whole_rows, _rows(True)),
)

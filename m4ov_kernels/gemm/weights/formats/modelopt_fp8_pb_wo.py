"""ModelOpt ``FP8_PB_WO``: ``weight`` float8_e4m3fn [N, K] and ``weight_scale`` float32 [⌈N/128⌉, 1, ⌈K/128⌉, 1], which
multiplies; a weight of one block has a scalar."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels.gemm.weights.formats import modelopt
from m4ov_kernels.gemm.weights.formats.fields import Config, Leaves, Tensors, Weight, cannot, named
from m4ov_kernels.gemm.weights.fp8 import Fp8Weight, scale_shape

NAME = "modelopt-fp8-pb-wo"
ALGORITHM = "FP8_PB_WO"
_FLOAT = (torch.float32,)


def read(tensors: Tensors, config: Config, prefix: str) -> Fp8Weight:
    leaves = Leaves(NAME, tensors, prefix)
    leaves.only("weight", "weight_scale")
    values = leaves.fp8()
    rows, columns = scale_shape(tuple(values.shape), "block")
    given = leaves.get("weight_scale") if leaves.has("weight_scale") else None
    if rows == columns == 1 and isinstance(given, Tensor) and given.dim() == 0:
        scales = leaves.scalar("weight_scale", _FLOAT)
    else:
        scales = leaves.scales("weight_scale", (rows, 1, columns, 1), _FLOAT)
    return Fp8Weight(values, scales.reshape(rows, columns), "block")


def write(weight: Weight, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(weight, Fp8Weight):
        cannot(NAME, weight, "the format stores float8_e4m3fn alone")
    if weight.granularity != "block":
        cannot(NAME, weight, "it has one scale for each 128×128 block")
    if weight.input_scale is not None:
        cannot(NAME, weight, "it is weight-only and has no place for input_scale")
    scales = weight.scales.float()
    scales = scales.reshape(()) if scales.numel() == 1 else scales[:, None, :, None].contiguous()
    return named(prefix, {"weight": weight.values, "weight_scale": scales}), modelopt.fragment(ALGORITHM.lower())

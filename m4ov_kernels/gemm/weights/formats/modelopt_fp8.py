"""ModelOpt ``FP8``: ``weight`` float8_e4m3fn [N, K], ``weight_scale`` and ``input_scale`` float32 scalars."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels.gemm.weights.formats import modelopt
from m4ov_kernels.gemm.weights.formats.fields import Config, Leaves, Tensors, Weight, cannot, named
from m4ov_kernels.gemm.weights.fp8 import Fp8Weight

NAME = "modelopt-fp8"
ALGORITHM = "FP8"


def read(tensors: Tensors, config: Config, prefix: str) -> Fp8Weight:
    leaves = Leaves(NAME, tensors, prefix)
    leaves.only("weight", "weight_scale", "input_scale")
    scale = leaves.scalar("weight_scale", (torch.float32,)).reshape(1, 1)
    return Fp8Weight(leaves.fp8(), scale, "tensor", leaves.scalar("input_scale", (torch.float32,)))


def write(weight: Weight, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(weight, Fp8Weight):
        cannot(NAME, weight, "the format stores float8_e4m3fn alone")
    if weight.granularity != "tensor":
        cannot(NAME, weight, "it has one scale for the tensor")
    if weight.input_scale is None:
        cannot(NAME, weight, "activations are static in it, and the weight has no input_scale")
    scales = {"weight_scale": weight.scales, "input_scale": weight.input_scale}
    out = {"weight": weight.values, **{name: scale.float().reshape(()) for name, scale in scales.items()}}
    return named(prefix, out), modelopt.fragment(ALGORITHM)

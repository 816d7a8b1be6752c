"""compressed-tensors ``int-quantized``, eight bits, per channel, symmetric: ``weight`` int8 [N, K], ``weight_scale``
[N, 1]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels.gemm.weights.formats import compressed_tensors
from m4ov_kernels.gemm.weights.formats.fields import Config, Leaves, Tensors, Weight, cannot, named
from m4ov_kernels.gemm.weights.int8 import Int8Weight

NAME = "compressed-tensors-int8"
FORMAT = "int-quantized"
_ARGUMENTS = {"num_bits": 8, "type": "int", "symmetric": True}


def read(tensors: Tensors, config: Config, prefix: str) -> Int8Weight:
    weights = compressed_tensors.weights_of(config, prefix, NAME, bits=8, kind="int")
    weights.get("symmetric", (True,), True)
    weights.get("strategy", ("channel",))
    leaves = Leaves(NAME, tensors, prefix)
    leaves.only("weight", "weight_scale")
    codes = leaves.take("weight", (torch.int8,), ("N", "K"))
    return Int8Weight(codes, leaves.scales("weight_scale", (codes.shape[0], 1)))


def write(weight: Weight, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(weight, Int8Weight):
        cannot(NAME, weight, "the format stores eight-bit integers alone")
    arguments = {**_ARGUMENTS, "strategy": "channel", "dynamic": False}
    activations = {**_ARGUMENTS, "strategy": "token", "dynamic": True}
    out = {"weight": weight.codes, "weight_scale": weight.scales}
    return named(prefix, out), compressed_tensors.fragment(FORMAT, arguments, activations)

"""ModelOpt ``W4A16_AWQ``: ``weight`` uint8 [N/2, K], two *rows* a byte, the even row low, two's complement;
``weight_scale`` float32 [N, K/g]; ``pre_quant_scale`` [K] multiplies the input, absent where a norm has absorbed it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels.gemm.weights.formats import modelopt
from m4ov_kernels.gemm.weights.formats.fields import (
    SCALE_DTYPES,
    Config,
    Leaves,
    Settings,
    Tensors,
    Weight,
    cannot,
    named,
)
from m4ov_kernels.gemm.weights.int4 import SYMMETRIC_ZERO, WHOLE_ROW, Int4Weight

NAME = "modelopt-w4a16-awq"
ALGORITHM = "W4A16_AWQ"


def read(tensors: Tensors, config: Config, prefix: str) -> Int4Weight:
    settings = modelopt.settings_of(config, prefix)
    settings.get("has_zero_point", (False,), False)
    leaves = Leaves(NAME, tensors, prefix)
    leaves.only("weight", "weight_scale", "pre_quant_scale")
    packed = leaves.take("weight", (torch.uint8,), ("N/2", "K"))
    N, K = 2 * packed.shape[0], packed.shape[1]
    if settings.values.get("group_size") is None:  # config.json does not say it; groups are whole, so the shapes do
        G = leaves.scales("weight_scale", (N, "G"), (torch.float32,)).shape[1]
        settings = Settings(NAME, {"group_size": K // G}, "the groups that weight_scale tells:")
    group_size = settings.group_size()
    if group_size == WHOLE_ROW:
        settings.refuse("group_size", "32, 64 or 128", group_size)
    if K % group_size:
        leaves.refuse("weight", f"[N/2, K] with K a multiple of the group size {group_size}", packed)
    scales = leaves.scales("weight_scale", (N, K // group_size), (torch.float32,))
    pre = leaves.scales("pre_quant_scale", (K,), SCALE_DTYPES) if leaves.has("pre_quant_scale") else None
    # Two's complement −8..7 is our code 0..15 with the highest bit turned over.
    codes = torch.stack((packed & 15, packed >> 4), dim=1).flatten(0, 1) ^ SYMMETRIC_ZERO
    return Int4Weight.from_codes(codes, scales, group_size=group_size, pre_quant_scale=pre)


def write(weight: Weight, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(weight, Int4Weight):
        cannot(NAME, weight, "the format stores four-bit integers alone")
    N, K = weight.shape
    if weight.zeros is not None and bool((weight.zeros != SYMMETRIC_ZERO).any()):
        cannot(NAME, weight, "it is symmetric, and the weight has zero points other than 8")
    if weight.g_idx is not None:
        cannot(NAME, weight, "it has no act-order (g_idx)")
    if N % 2:
        cannot(NAME, weight, f"two output features make a byte, and {N} is odd")
    if weight.group_size == WHOLE_ROW or K % weight.group_size:
        cannot(NAME, weight, f"it has whole groups of 32, 64 or 128 input features, and K is {K}")
    signed = weight.codes() ^ SYMMETRIC_ZERO
    out = {
        "weight": signed[0::2] | (signed[1::2] << 4),
        "weight_scale": weight.scales.float(),
        "pre_quant_scale": weight.pre_quant_scale,
    }
    config = modelopt.fragment(ALGORITHM, group_size=weight.group_size, has_zero_point=False, pre_quant_scale=True)
    return named(prefix, out), config

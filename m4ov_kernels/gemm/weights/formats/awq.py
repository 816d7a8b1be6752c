"""AWQ, the GEMM version: AutoAWQ's ``WQLinear_GEMM``. Nibbles run along the output features, in an order of its own.

``qweight`` int32 [K, N/8] and ``qzeros`` int32 [K/g, N/8]: nibble i of word j is column 8j + ``ORDER[i]``;
``scales`` [K/g, N]; W = (q − z)·s, z stored as it is. No act-order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels.gemm.weights import bits
from m4ov_kernels.gemm.weights.formats.fields import (
    Config,
    Leaves,
    Settings,
    Tensors,
    Weight,
    cannot,
    half_scales,
    named,
)
from m4ov_kernels.gemm.weights.int4 import SYMMETRIC_ZERO, WHOLE_ROW, Int4Weight

NAME = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = tuple(ORDER.index(i) for i in range(bits.PER_WORD))


def _reorder(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    return codes.unflatten(1, (-1, bits.PER_WORD))[:, :, list(order)].flatten(1)


def _pack(codes: Tensor) -> Tensor:
    """uint8 [R, N] → int32 [R, N/8]."""
    return bits.pack_words(_reorder(codes, ORDER))


def _unpack(words: Tensor) -> Tensor:
    return _reorder(bits.unpack_words(words, words.shape[1] * bits.PER_WORD), _INVERSE)


def exclusions(config: Config) -> list[str]:
    """What the config leaves unquantised."""
    return Settings(NAME, config).names("modules_to_not_convert")


def excludes(entry: str, prefix: str) -> bool:
    """Any part of a name, as transformers and engines take it: "mlp.gate" is in "mlp.gate_proj"."""
    return entry in prefix


def read(tensors: Tensors, config: Config, prefix: str) -> Int4Weight:
    settings = Settings(NAME, config)
    settings.get("bits" if "bits" in config else "w_bit", (4,))
    version = config.get("version") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        settings.refuse("version", "'gemm' (the other layouts are a kernel's own)", version)
    group_size = settings.group_size("group_size" if "group_size" in config else "q_group_size")
    zero_point = settings.get("zero_point", (True, False), True)
    for name in exclusions(config):
        if excludes(name, prefix):
            settings.refuse("modules_to_not_convert", f"without {prefix}, whose tensors are quantised", name)

    leaves = Leaves(NAME, tensors, prefix)
    leaves.only("qweight", "qzeros", "scales")
    qweight = leaves.take("qweight", (torch.int32,), ("K", "N/8"))
    K, N = qweight.shape[0], qweight.shape[1] * bits.PER_WORD
    if group_size != WHOLE_ROW and K % group_size:
        leaves.refuse("qweight", f"[K, N/8] with K a multiple of the group size {group_size}", qweight)
    G = 1 if group_size == WHOLE_ROW else K // group_size
    zeros = _unpack(leaves.take("qzeros", (torch.int32,), (G, N // bits.PER_WORD))).T.contiguous()
    scales = leaves.scales("scales", (G, N)).T.contiguous()
    if not zero_point and zeros.device.type == "cpu" and bool((zeros != SYMMETRIC_ZERO).any()):
        leaves.refuse("qzeros", "8 throughout where the config says zero_point: false", "other zero points")
    codes = _unpack(qweight).T
    return Int4Weight.from_codes(codes, scales, group_size=group_size, zeros=zeros if zero_point else None)


def write(weight: Weight, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(weight, Int4Weight):
        cannot(NAME, weight, "the format stores four-bit integers alone")
    N, K = weight.shape
    if N % bits.PER_WORD:
        cannot(NAME, weight, f"eight output features make a word, and {N} isn't a multiple of 8")
    if weight.group_size != WHOLE_ROW and K % weight.group_size:
        cannot(NAME, weight, f"every group is whole, and {K} isn't a multiple of {weight.group_size}")
    if weight.g_idx is not None:
        cannot(NAME, weight, "it has no act-order (g_idx)")
    if weight.pre_quant_scale is not None:
        cannot(NAME, weight, "it has no place for pre_quant_scale")
    zeros = weight.with_zeros().zeros
    assert zeros is not None
    out = {
        "qweight": _pack(weight.codes().T.contiguous()),
        "qzeros": _pack(zeros.T.contiguous()),
        "scales": half_scales(NAME, weight).T.contiguous(),
    }
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": weight.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    return named(prefix, out), config

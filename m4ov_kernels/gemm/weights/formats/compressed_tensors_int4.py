"""compressed-tensors ``pack-quantized``, four bits: symmetric, asymmetric, act-order.

``weight_packed`` int32 [N, ⌈K/8⌉], lowest nibble = lowest k, holding q + 8 of q in −8..7: our codes 0..15;
``weight_scale`` [N, G]; ``weight_shape`` int64 [2]; asymmetric: ``weight_zero_point`` int32 [⌈N/8⌉, G], packed along N;
``actorder: group``: ``weight_g_idx`` int32 [K].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels.gemm.weights import bits
from m4ov_kernels.gemm.weights.formats import compressed_tensors
from m4ov_kernels.gemm.weights.formats.fields import Config, Leaves, Tensors, Weight, cannot, named
from m4ov_kernels.gemm.weights.int4 import WHOLE_ROW, Int4Weight, groups_of, pack_zeros, unpack_zeros

NAME = "compressed-tensors-int4"
FORMAT = "pack-quantized"


def read(tensors: Tensors, config: Config, prefix: str) -> Int4Weight:
    weights = compressed_tensors.weights_of(config, prefix, NAME, bits=4, kind="int")
    symmetric = weights.get("symmetric", (True, False), True)
    strategy = weights.get("strategy", ("group", "channel", None))
    # The library infers a strategy that is not given from the group size.
    by_row = strategy == "channel" or (strategy is None and weights.values.get("group_size") == WHOLE_ROW)
    if by_row:
        weights.get("group_size", (WHOLE_ROW, None))
    group_size = WHOLE_ROW if by_row else weights.group_size()
    actorder = weights.get("actorder", ("group", "dynamic", "weight", "static", False, None))

    leaves = Leaves(NAME, tensors, prefix)
    allowed = ["weight_packed", "weight_scale", "weight_shape", "input_scale", "input_zero_point"]
    allowed += [] if symmetric else ["weight_zero_point"]
    leaves.only(*allowed, *(["weight_g_idx"] if actorder in ("group", "dynamic") else []))
    words = leaves.take("weight_packed", (torch.int32,), ("N", "⌈K/8⌉"))
    shape = leaves.take("weight_shape", (torch.int64, torch.int32), (2,))
    N, K = (int(size) for size in shape)
    if words.shape[0] != N or K < 1 or bits.words_for(K) != words.shape[1]:
        leaves.refuse("weight_shape", f"[{words.shape[0]}, K] with ⌈K/8⌉ = {words.shape[1]}", [N, K])
    if group_size != WHOLE_ROW and K % group_size:
        leaves.refuse("weight_shape", f"[N, K] with K a multiple of the group size {group_size}", [N, K])
    G = groups_of(K, group_size)
    scales = leaves.scales("weight_scale", (N, G))
    zeros = None
    if not symmetric:
        zeros = unpack_zeros(leaves.take("weight_zero_point", (torch.int32,), (bits.words_for(N), G)), N)
    g_idx = _group_index(leaves, K, group_size, G) if actorder in ("group", "dynamic") else None
    # What a word holds past K is nobody's; ours is 0.
    codes = bits.unpack_words(words, K)
    return Int4Weight.from_codes(codes, scales, group_size=group_size, zeros=zeros, g_idx=g_idx)


def _group_index(leaves: Leaves, K: int, group_size: int, G: int) -> Tensor | None:
    """−1 throughout: never set, no act-order. The library sorts columns by group and cuts every `group_size` of them,
    so that a g_idx means what it says only if every group has that many."""
    value = leaves.take("weight_g_idx", (torch.int32, torch.int64), (K,))
    if bool((value == -1).all()):
        return None
    value = leaves.group_index("weight_g_idx", K, G)
    sizes = torch.bincount(value.long(), minlength=G)
    if group_size != WHOLE_ROW and bool((sizes != group_size).any()):
        leaves.refuse("weight_g_idx", f"{group_size} input features in every group", sizes.tolist())
    return value


def write(weight: Weight, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(weight, Int4Weight):
        cannot(NAME, weight, "we write its four-bit integers alone")
    N, K = weight.shape
    if weight.pre_quant_scale is not None:
        cannot(NAME, weight, "it has no place for pre_quant_scale")
    if weight.group_size != WHOLE_ROW and K % weight.group_size:
        cannot(NAME, weight, f"the library takes whole groups alone, and {K} isn't a multiple of {weight.group_size}")
    if weight.g_idx is not None:
        sizes = torch.bincount(weight.g_idx.long(), minlength=weight.scales.shape[1])
        if bool((sizes != weight.group_size).any()):
            cannot(NAME, weight, f"the library cuts the sorted columns every group_size; g_idx has {sizes.tolist()}")
    out: dict[str, Tensor | None] = {
        "weight_packed": bits.to_words(weight.packed),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor([N, K], dtype=torch.int64),
        "weight_zero_point": None if weight.zeros is None else pack_zeros(weight.zeros),
        "weight_g_idx": weight.g_idx,
    }
    by_row = weight.group_size == WHOLE_ROW
    arguments = {
        "num_bits": 4,
        "type": "int",
        "symmetric": weight.symmetric,
        "strategy": "channel" if by_row else "group",
        "group_size": None if by_row else weight.group_size,
        "dynamic": False,
    }
    if weight.g_idx is not None:
        arguments["actorder"] = "group"
    return named(prefix, out), compressed_tensors.fragment(FORMAT, arguments, None)

"""GPTQ, versions 1 and 2: AutoGPTQ's and GPTQModel's linears, which differ in how a zero point is stored.

``qweight`` int32 [K/8, N], lowest nibble = lowest k; ``qzeros`` int32 [G, N/8], lowest nibble = lowest n, z − 1 in
version 1 and z in version 2; ``scales`` [G, N]; ``g_idx`` int32 [K], the group of each input feature. G = ⌈K/g⌉.
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
    matches,
    named,
)
from m4ov_kernels.gemm.weights.int4 import SYMMETRIC_ZERO, Int4Weight, groups_of, natural_groups

V1 = "gptq"
V2 = "gptq_v2"
_ONES = 0x11111111


def settings_of(config: Config, prefix: str, name: str) -> Settings:
    """The config with what GPTQModel's ``dynamic`` says of this module: "+:pattern" changes, "-:pattern" excludes."""
    settings = Settings(name, config)
    dynamic = config.get("dynamic")
    if not dynamic:
        return settings
    for pattern, changes in settings.part("dynamic").values.items():
        excludes = pattern.startswith("-:")
        if matches(name, pattern.removeprefix("-:").removeprefix("+:"), prefix):
            if excludes:
                settings.refuse("dynamic", f"not to exclude {prefix}, whose tensors are quantised", pattern)
            return Settings(name, {**config, **(changes or {})}, f"config with dynamic[{pattern!r}]")
    return settings


def exclusions(config: Config) -> list[str]:
    """The patterns of ``dynamic`` that leave modules unquantised; there is no other list."""
    dynamic = config.get("dynamic")
    return [pattern for pattern in Settings(V1, dynamic or {}, "config['dynamic']").values if pattern.startswith("-:")]


def excludes(entry: str, prefix: str) -> bool:
    return matches(V1, entry.removeprefix("-:"), prefix)


def _stored_zeros(leaves: Leaves, words: Tensor, config: Config, name: str) -> Tensor:
    """Zero points [G, N] of 0..15 out of qzeros.

    A nibble 15 of version 1 came of z = 0, and its owners differ: GPTQModel subtracted 1 from whole words, so a borrow
    ran into the neighbours, and adding it back restores them; others read it as 16. So only its files may hold one.
    """
    N = words.shape[1] * bits.PER_WORD
    if name == V2:
        return bits.unpack_words(words, N)
    stored = bits.unpack_words(words, N)
    if bool((stored == 15).any()):
        meta = config.get("meta")
        maker = str(meta.get("quantizer", "")) if isinstance(meta, dict) else ""
        if "gptqmodel" not in maker.lower():
            leaves.refuse(
                "qzeros",
                "free of 15, which is z − 1 of no zero point that version 1's readers agree on (write gptq_v2)",
                f"{int((stored == 15).sum())} of them",
            )
        sums = (words.long() + _ONES) & 0xFFFFFFFF
        return bits.unpack_words((sums - ((sums >> 31) << 32)).to(torch.int32), N)
    return stored + 1


def _read(tensors: Tensors, config: Config, prefix: str, name: str) -> Int4Weight:
    settings = settings_of(config, prefix, name)
    settings.get("bits", (4,))
    settings.get("checkpoint_format", (V2,) if name == V2 else (V1, None))
    settings.get("is_marlin_format", (False, None))
    group_size = settings.group_size()
    act_order = settings.get("desc_act", (True, False), False)
    symmetric = settings.get("sym", (True, False))

    leaves = Leaves(name, tensors, prefix)
    leaves.only("qweight", "qzeros", "scales", "g_idx")
    qweight = leaves.take("qweight", (torch.int32,), ("K/8", "N"))
    K, N = qweight.shape[0] * bits.PER_WORD, qweight.shape[1]
    if N % bits.PER_WORD:
        leaves.refuse("qweight", "[K/8, N] with N a multiple of 8 (qzeros packs eight of them)", qweight)
    G = groups_of(K, group_size)
    words = leaves.take("qzeros", (torch.int32,), (G, N // bits.PER_WORD))
    zeros = _stored_zeros(leaves, words, config, name).T.contiguous()
    scales = leaves.scales("scales", (G, N)).T.contiguous()
    g_idx = None
    if leaves.has("g_idx") or act_order:
        g_idx = leaves.group_index("g_idx", K, G)
        if not act_order and not torch.equal(g_idx, natural_groups(K, group_size, g_idx.device)):
            leaves.refuse("g_idx", "k // group_size where the config says desc_act: false", "another order")
    if symmetric and bool((zeros != SYMMETRIC_ZERO).any()):
        leaves.refuse("qzeros", "8 throughout where the config says sym: true", "other zero points")
    packed = bits.from_words(qweight.T)
    return Int4Weight(packed, scales, K, group_size, None if symmetric else zeros, g_idx)


def _write(weight: Weight, prefix: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(weight, Int4Weight):
        cannot(name, weight, "we write its four-bit integers alone")
    N, K = weight.shape
    for size, what in ((K, "input"), (N, "output")):
        if size % bits.PER_WORD:
            cannot(name, weight, f"eight {what} features make a word, and {size} isn't a multiple of 8")
    if weight.pre_quant_scale is not None:
        cannot(name, weight, "it has no place for pre_quant_scale")
    zeros = weight.with_zeros().zeros
    assert zeros is not None
    if name == V1:
        if bool((zeros == 0).any()):
            cannot(name, weight, "version 1 stores z − 1, so it has no zero point 0; write gptq_v2")
        zeros = zeros - 1
    out = {
        "qweight": bits.to_words(weight.packed).T.contiguous(),
        "qzeros": bits.pack_words(zeros.T.contiguous()),
        "scales": half_scales(name, weight).T.contiguous(),
        "g_idx": weight.groups(),
    }
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": weight.group_size,
        "desc_act": weight.g_idx is not None,
        "sym": weight.symmetric,
        "checkpoint_format": name,
    }
    return named(prefix, out), config


def read_v1(tensors: Tensors, config: Config, prefix: str) -> Int4Weight:
    return _read(tensors, config, prefix, V1)


def read_v2(tensors: Tensors, config: Config, prefix: str) -> Int4Weight:
    return _read(tensors, config, prefix, V2)


def write_v1(weight: Weight, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return _write(weight, prefix, V1)


def write_v2(weight: Weight, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return _write(weight, prefix, V2)

"""Block fp8 as DeepSeek and Qwen publish it: ``weight`` float8_e4m3fn [N, K] and ``weight_scale_inv``
[⌈N/128⌉, ⌈K/128⌉], which is *multiplied* in spite of its name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from m4ov_kernels.gemm.weights.formats.fields import Config, Leaves, Settings, Tensors, Weight, cannot, named
from m4ov_kernels.gemm.weights.fp8 import BLOCK, Fp8Weight, scale_shape

NAME = "block-fp8"


def exclusions(config: Config) -> list[str]:
    """What the config leaves unquantised."""
    settings = Settings(NAME, config)
    return [*settings.names("modules_to_not_convert"), *settings.names("ignored_layers")]


def excludes(entry: str, prefix: str) -> bool:
    return prefix == entry or prefix.startswith(f"{entry}.")


def read(tensors: Tensors, config: Config, prefix: str) -> Fp8Weight:
    settings = Settings(NAME, config)
    settings.get("activation_scheme", ("dynamic",), "dynamic")
    settings.get("fmt", ("e4m3", None))
    block = config.get("weight_block_size")
    if not isinstance(block, (list, tuple)) or list(block) != [BLOCK, BLOCK]:
        settings.refuse("weight_block_size", f"[{BLOCK}, {BLOCK}]", block)
    for name in exclusions(config):
        if excludes(name, prefix):
            settings.refuse("modules_to_not_convert", f"without {prefix!r}, whose tensors are quantised", name)
    leaves = Leaves(NAME, tensors, prefix)
    leaves.only("weight", "weight_scale_inv")
    values = leaves.fp8()
    return Fp8Weight(values, leaves.scales("weight_scale_inv", scale_shape(tuple(values.shape), "block")), "block")


def write(weight: Weight, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(weight, Fp8Weight):
        cannot(NAME, weight, "the format stores float8_e4m3fn alone")
    if weight.granularity != "block":
        cannot(NAME, weight, "it has one scale for each 128×128 block")
    if weight.input_scale is not None:
        cannot(NAME, weight, "activations are dynamic in it, and the weight has an input_scale")
    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": [],
    }
    return named(prefix, {"weight": weight.values, "weight_scale_inv": weight.scales}), config

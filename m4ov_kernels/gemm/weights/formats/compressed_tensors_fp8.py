"""compressed-tensors ``float-quantized``, e4m3: ``weight`` float8_e4m3fn [N, K]; ``weight_scale``, which multiplies,
[1] (tensor), [N, 1] (channel) or [⌈N/128⌉, ⌈K/128⌉] (block); ``input_scale`` [1] where activations are static."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from m4ov_kernels.gemm.weights.formats import compressed_tensors
from m4ov_kernels.gemm.weights.formats.fields import Config, Leaves, Settings, Tensors, Weight, cannot, named
from m4ov_kernels.gemm.weights.fp8 import BLOCK, GRANULARITIES, Fp8Weight, scale_shape

NAME = "compressed-tensors-fp8"
FORMAT = "float-quantized"


def read(tensors: Tensors, config: Config, prefix: str) -> Fp8Weight:
    weights = compressed_tensors.weights_of(config, prefix, NAME, bits=8, kind="float")
    weights.get("symmetric", (True,), True)
    granularity = weights.get("strategy", GRANULARITIES)
    if granularity == "block":  # older versions wrote it as a string
        weights.get("block_structure", ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"))
    scheme = compressed_tensors.scheme_of(config, prefix)
    static = False
    if scheme.values.get("input_activations") is not None:
        activations = Settings(NAME, scheme.values["input_activations"], f"{scheme.where}['input_activations']")
        activations.get("num_bits", (8,))
        activations.get("type", ("float",))
        static = not activations.get("dynamic", (True, False), False)
        if static:
            activations.get("strategy", ("tensor", None))

    leaves = Leaves(NAME, tensors, prefix)
    leaves.only("weight", "weight_scale", *(["input_scale"] if static else []))
    values = leaves.fp8()
    if granularity == "tensor":
        scales = leaves.scalar("weight_scale").reshape(1, 1)
    else:
        scales = leaves.scales("weight_scale", scale_shape(tuple(values.shape), granularity))
    return Fp8Weight(values, scales, granularity, leaves.scalar("input_scale") if static else None)


def write(weight: Weight, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(weight, Fp8Weight):
        cannot(NAME, weight, "the format stores float8_e4m3fn alone")
    arguments: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": weight.granularity}
    activations = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": weight.input_scale is None}
    if weight.input_scale is not None or weight.granularity == "tensor":
        activations["strategy"] = "tensor"
    elif weight.granularity == "channel":
        activations["strategy"] = "token"
    else:
        activations |= {"strategy": "group", "group_size": BLOCK}
    if weight.granularity == "block":
        arguments["block_structure"] = [BLOCK, BLOCK]
    scales = weight.scales.reshape(1) if weight.granularity == "tensor" else weight.scales
    out = {"weight": weight.values, "weight_scale": scales, "input_scale": weight.input_scale}
    return named(prefix, out), compressed_tensors.fragment(FORMAT, {**arguments, "dynamic": False}, activations)

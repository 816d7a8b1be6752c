"""Every format that is read and written, and which one a checkpoint has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from m4ov_kernels.checks import describe, refuse
from m4ov_kernels.gemm.weights.formats import (
    awq,
    block_fp8,
    compressed_tensors,
    compressed_tensors_fp8,
    compressed_tensors_int4,
    compressed_tensors_int8,
    gptq,
    modelopt,
    modelopt_fp8,
    modelopt_fp8_pb_wo,
    modelopt_w4a16_awq,
)
from m4ov_kernels.gemm.weights.formats.fields import Config, Leaves, Settings, Tensors, Weight

Written = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Format:
    """One format: its name, the tensor that a weight in it must have, its reader and its writer."""

    name: str
    leaf: str
    read: Callable[[Tensors, Config, str], Weight]
    write: Callable[[Weight, str], Written]


FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Format(awq.NAME, "qweight", awq.read, awq.write),
        Format(gptq.V1, "qweight", gptq.read_v1, gptq.write_v1),
        Format(gptq.V2, "qweight", gptq.read_v2, gptq.write_v2),
        Format(
            compressed_tensors_int4.NAME, "weight_packed", compressed_tensors_int4.read, compressed_tensors_int4.write
        ),
        Format(compressed_tensors_int8.NAME, "weight", compressed_tensors_int8.read, compressed_tensors_int8.write),
        Format(compressed_tensors_fp8.NAME, "weight", compressed_tensors_fp8.read, compressed_tensors_fp8.write),
        Format(modelopt_fp8.NAME, "weight", modelopt_fp8.read, modelopt_fp8.write),
        Format(modelopt_fp8_pb_wo.NAME, "weight", modelopt_fp8_pb_wo.read, modelopt_fp8_pb_wo.write),
        Format(modelopt_w4a16_awq.NAME, "weight", modelopt_w4a16_awq.read, modelopt_w4a16_awq.write),
        Format(block_fp8.NAME, "weight", block_fp8.read, block_fp8.write),
    )
}
_STORED_BY_COMPRESSED_TENSORS = {
    compressed_tensors_int4.FORMAT: compressed_tensors_int4.NAME,
    compressed_tensors_int8.FORMAT: compressed_tensors_int8.NAME,
    compressed_tensors_fp8.FORMAT: compressed_tensors_fp8.NAME,
}
_MADE_BY_MODELOPT = {
    modelopt_fp8.ALGORITHM: modelopt_fp8.NAME,
    modelopt_fp8_pb_wo.ALGORITHM: modelopt_fp8_pb_wo.NAME,
    modelopt_w4a16_awq.ALGORITHM: modelopt_w4a16_awq.NAME,
}
# By quant_method, the module that knows how the config lists what is not quantised.
_LISTS: dict[str, Any] = {"awq": awq, "gptq": gptq, compressed_tensors.METHOD: compressed_tensors, "fp8": block_fp8}


def detect(tensors: Tensors, config: Config, prefix: str = "") -> str:
    """The name, a key of ``FORMATS``, of the format in which `tensors` hold the weight of module `prefix`.

    Args:
        tensors: names to tensors, as a safetensors file has them.
        config: ``quantization_config`` of config.json, or ModelOpt's hf_quant_config.json.
        prefix: the module's name in `tensors`: "model.layers.0.mlp.up_proj".

    Raises:
        TypeError, ValueError: the config is of no format that is known here, or the weight is not there in that format
            (as where a layer was left unquantised).
    """
    for argument, value in (("tensors", tensors), ("config", config)):
        if not isinstance(value, Mapping):
            refuse(TypeError, "detect", argument, "a mapping", describe(value))
    if not isinstance(prefix, str):
        refuse(TypeError, "detect", "prefix", "a string", describe(prefix))
    name = _by_config(config, prefix)
    leaves = Leaves(name, tensors, prefix)
    leaf = FORMATS[name].leaf
    if not leaves.has(leaf):
        leaves.refuse(leaf, "there, as the config says", None)
    value = leaves.get(leaf)
    if isinstance(value, Tensor) and value.is_floating_point() and value.element_size() > 1:
        leaves.refuse(leaf, "quantised, as the config says", value)
    return name


def _by_config(config: Config, prefix: str) -> str:
    settings = Settings("detect", config)
    if modelopt.is_modelopt(config):
        return _known("modelopt's quant_algo", _MADE_BY_MODELOPT, modelopt.algorithm_of(config, prefix))
    method = settings.get("quant_method", ("awq", "gptq", "compressed-tensors", "fp8"), config.get("quant_method"))
    if method == "compressed-tensors":
        stored = compressed_tensors.format_of(config, prefix)
        return _known("compressed-tensors' format", _STORED_BY_COMPRESSED_TENSORS, stored)
    if method == "fp8":
        return block_fp8.NAME
    if method == "gptq":
        return gptq.V2 if config.get("checkpoint_format") == gptq.V2 else gptq.V1
    return awq.NAME


def exclusions(config: Config) -> dict[str, Callable[[str], bool]]:
    """Every entry of a config's list of modules that are not quantised → whether it names the module of a prefix.

    Raises:
        TypeError, ValueError: the config is of no format that is known here, or its list is none.
    """
    if not isinstance(config, Mapping):
        refuse(TypeError, "exclusions", "config", "a mapping", describe(config))
    rule: Any = modelopt if modelopt.is_modelopt(config) else _LISTS.get(str(config.get("quant_method")))
    if rule is None:
        refuse(ValueError, "exclusions", "quant_method", f"one of {', '.join(_LISTS)}", config.get("quant_method"))
    return {entry: partial(rule.excludes, entry) for entry in rule.exclusions(config)}


def _known(what: str, table: Mapping[str, str], value: str) -> str:
    if value not in table:
        refuse(ValueError, "detect", what, "one of " + ", ".join(map(repr, table)), repr(value))
    return table[value]


def read(tensors: Tensors, config: Config, prefix: str = "") -> Weight:
    """The weight of module `prefix`, exactly: arguments and errors of :func:`detect`.

    Every tensor's dtype and shape is checked against the others and the config, indices against their range, scales
    for NaN and infinities; a tensor of the weight that the format does not define is refused. Nothing is rounded. The
    result may share memory with `tensors`. No file is opened here: a caller takes `tensors` from safetensors.
    """
    return FORMATS[detect(tensors, config, prefix)].read(tensors, config, prefix)


def write(weight: Weight, format: str, prefix: str = "") -> Written:
    """The tensors of `weight` under the names of `format`, and the config that says so.

    Together with :func:`read` this converts between formats and loses nothing: what a format cannot express is refused.
    Scales keep their dtype where the format allows it; ModelOpt's are float32, to which the narrower ones are widened
    exactly. The config is a whole one for one kind of weight, equal for all weights of that kind; lists of modules that
    are not quantised are left empty for the caller.

    Args:
        weight: an Int4Weight, Int8Weight or Fp8Weight.
        format: a key of ``FORMATS``.
        prefix: the module's name.

    Raises:
        ValueError: no such format, or it cannot express the weight (the message says why).
    """
    if format not in FORMATS:
        refuse(ValueError, "write", "format", "one of " + ", ".join(map(repr, FORMATS)), repr(format))
    if not isinstance(weight, Weight):
        refuse(TypeError, "write", "weight", "an Int4Weight, Int8Weight or Fp8Weight", describe(weight))
    return FORMATS[format].write(weight, prefix)

"""The config of ModelOpt: ``hf_quant_config.json`` ({producer, quantization}), or the flat one in ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from m4ov_kernels.gemm.weights.formats.fields import Config, Settings

METHOD = "modelopt"


def is_modelopt(config: Config) -> bool:
    producer = config.get("producer")
    named = isinstance(producer, Mapping) and producer.get("name") == METHOD
    return named or str(config.get("quant_method", "")).lower() == METHOD


def exclusions(config: Config) -> list[str]:
    """What the config leaves unquantised."""
    settings = Settings(METHOD, config)
    if "quantization" in config:
        settings = settings.part("quantization")
    return [*settings.names("exclude_modules"), *settings.names("ignore")]


def excludes(entry: str, prefix: str) -> bool:
    return fnmatchcase(prefix, entry) or prefix.startswith(f"{entry}.")


def settings_of(config: Config, prefix: str) -> Settings:
    """The settings of one module: the config's, or its own where precisions are mixed."""
    settings = Settings(METHOD, config)
    if "quantization" in config:
        settings = settings.part("quantization")
    for pattern in exclusions(config):
        if excludes(pattern, prefix):
            settings.refuse("exclude_modules", f"without {prefix!r}, whose tensors are quantised", pattern)
    if str(settings.values.get("quant_algo", "")).upper() == "MIXED_PRECISION":
        layers = settings.part("quantized_layers")
        if prefix not in layers.values:
            settings.refuse("quantized_layers", f"an entry for {prefix!r}", sorted(map(str, layers.values))[:8])
        return layers.part(prefix)
    return settings


def algorithm_of(config: Config, prefix: str) -> str:
    settings = settings_of(config, prefix)
    value = settings.values.get("quant_algo")
    if not isinstance(value, str):
        settings.refuse("quant_algo", "the name of an algorithm", value)
    return value.upper()  # FP8_PB_WO is exported in lower case, the others in upper case


def fragment(algorithm: str, **settings: Any) -> dict[str, Any]:
    """What goes into ``hf_quant_config.json``; exclude_modules are the caller's to fill in."""
    quantization = {"quant_algo": algorithm, "kv_cache_quant_algo": None, **settings, "exclude_modules": []}
    return {"producer": {"name": METHOD}, "quantization": quantization}

"""Qwen3-VL on one device: our own model, and (``hf_*``) transformers' class run on packed batches.

What needs transformers is imported when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from m4ov.models.qwen3_vl.config import Config, ConfigurationError, TextConfig, VisionConfig
from m4ov.models.qwen3_vl.flops import training_flops
from m4ov.models.qwen3_vl.model import Output, Qwen3VL, TokenLoss, new
from m4ov.models.qwen3_vl.weights import configuration, export, from_pretrained, load, read, save, shapes
from m4ov.models.sharded import WeightsError

if TYPE_CHECKING:
    from m4ov.models.qwen3_vl.hf_build import build, cast_parameters, config_of, qwen3_vl_config
    from m4ov.models.qwen3_vl.hf_packed import forward

__all__ = [
    "Config",
    "ConfigurationError",
    "Output",
    "Qwen3VL",
    "TextConfig",
    "TokenLoss",
    "VisionConfig",
    "WeightsError",
    "build",
    "cast_parameters",
    "config_of",
    "configuration",
    "export",
    "forward",
    "from_pretrained",
    "load",
    "new",
    "qwen3_vl_config",
    "read",
    "save",
    "shapes",
    "training_flops",
]


def __getattr__(name: str) -> Any:
    if name in ("build", "cast_parameters", "config_of", "qwen3_vl_config"):
        from m4ov.models.qwen3_vl import hf_build

        return getattr(hf_build, name)
    if name == "forward":
        from m4ov.models.qwen3_vl import hf_packed

        return hf_packed.forward
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

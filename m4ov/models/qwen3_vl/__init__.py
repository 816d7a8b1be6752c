"""Qwen3-VL on one device: our own model, and (``hf_*``) transformers' class, patched, run on packed batches."""

from __future__ import annotations

from m4ov.models.qwen3_vl.config import Config, ConfigurationError, TextConfig, VisionConfig
from m4ov.models.qwen3_vl.hf_build import build, cast_parameters, qwen3_vl_config
from m4ov.models.qwen3_vl.hf_packed import forward
from m4ov.models.qwen3_vl.model import Output, Qwen3VL, TokenLoss, new
from m4ov.models.qwen3_vl.weights import configuration, export, from_pretrained, load, read, save, shapes
from m4ov.models.sharded import WeightsError

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
]

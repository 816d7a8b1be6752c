"""Qwen3-VL on one device: our own model, and (``hf_*``) transformers' class, patched, run on packed batches."""

from __future__ import annotations

from m4ov.models.qwen3_vl.config import Config, ConfigurationError, TextConfig, VisionConfig
from m4ov.models.qwen3_vl.flops import training_flops
from m4ov.models.qwen3_vl.hf_build import build, cast_parameters, qwen3_vl_config
from m4ov.models.qwen3_vl.hf_packed import forward
from m4ov.models.qwen3_vl.model import Qwen3VL, TokenLoss, new

__all__ = [
    "Config",
    "ConfigurationError",
    "Qwen3VL",
    "TextConfig",
    "TokenLoss",
    "VisionConfig",
    "build",
    "cast_parameters",
    "forward",
    "new",
    "qwen3_vl_config",
    "training_flops",
]

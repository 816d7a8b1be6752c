"""Qwen3-VL on one device."""

from __future__ import annotations

from m4ov.models.qwen3_vl.build import build, cast_parameters, qwen3_vl_config
from m4ov.models.qwen3_vl.flops import training_flops
from m4ov.models.qwen3_vl.packed import forward

__all__ = ["build", "cast_parameters", "forward", "qwen3_vl_config", "training_flops"]

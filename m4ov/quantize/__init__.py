"""Quantising a checkpoint, and loading a quantised one."""

from __future__ import annotations

from m4ov.quantize.calibration import Batch, collect, run
from m4ov.quantize.checkpoint import QuantizedCheckpointError, is_quantized, load
from m4ov.quantize.data import Calibration
from m4ov.quantize.flow import Result, half_dtype, load_source, model_class, quantize
from m4ov.quantize.plan import Layer, Options
from m4ov.quantize.progress import Stages
from m4ov.quantize.report import Report, Side, measure_side, print_report
from m4ov.quantize.schemes import SCHEMES, Scheme
from m4ov.quantize.sensitivity import Keep

__all__ = [
    "SCHEMES",
    "Batch",
    "Calibration",
    "Keep",
    "Layer",
    "Options",
    "QuantizedCheckpointError",
    "Report",
    "Result",
    "Scheme",
    "Side",
    "Stages",
    "collect",
    "half_dtype",
    "is_quantized",
    "load",
    "load_source",
    "measure_side",
    "model_class",
    "print_report",
    "quantize",
    "run",
]

"""Draws and faults of the options that many operators share."""

from __future__ import annotations

import math

import torch

from .. import draws
from ..draws import Draw
from . import corruptions

NUMERICS = corruptions.value("numerics", ValueError, "unknown", "HF", "", "bf16", None, 0, b"hf", ["hf"])


def tensor_dtype(draw: Draw) -> torch.dtype:
    """One that the kernels serve, or now and then float64, which the reference does."""
    return torch.float64 if draw.one_in(64) else draw.choice(draws.DTYPES)


def number(argument: str) -> corruptions.Corruption:
    return corruptions.value(argument, TypeError, "not a number", "1e-6", 1j, [0.5], b"1")


def nonnegative(argument: str) -> tuple[corruptions.Corruption, ...]:
    below = corruptions.value(argument, ValueError, "below 0 or NaN", -1.0, -1e-30, -math.inf, math.nan)
    return below, number(argument), corruptions.value(argument, TypeError, "missing", None)

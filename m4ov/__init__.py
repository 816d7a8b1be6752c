"""Trains and serves vision-language models with m4ov_kernels and PyTorch."""

from __future__ import annotations

__version__ = "0.1.0"

"""The vision operators in Triton, for CUDA and ROCm (and, interpreted, for CPU tensors). One file for each group of
operators; this one hands their raw functions on, and the table of all their kernels."""

from __future__ import annotations

from typing import Any

__all__ = ["KERNELS"]

KERNELS: list[Any] = []

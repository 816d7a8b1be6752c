"""The operators in Triton, for CUDA and ROCm (and, interpreted, for CPU tensors); a file for each."""

from __future__ import annotations

from m4ov_kernels.gpu import Build

KERNELS: list[Build] = []

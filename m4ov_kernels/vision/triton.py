"""The GPU kernels of the family, declared."""

from __future__ import annotations

from m4ov_kernels.vision.pixels_cuda import CUDA_KERNELS

KERNELS = [*CUDA_KERNELS]

"""Quantised weights, ``Int4Weight``, ``Int8Weight``, ``Fp8Weight``, and the formats of checkpoints that hold them."""

from m4ov_kernels.gemm.weights.formats.registry import FORMATS, Format, detect, exclusions, read, write
from m4ov_kernels.gemm.weights.fp8 import Fp8Weight
from m4ov_kernels.gemm.weights.int4 import Int4Weight
from m4ov_kernels.gemm.weights.int8 import Int8Weight

__all__ = ["FORMATS", "Format", "Fp8Weight", "Int4Weight", "Int8Weight", "detect", "exclusions", "read", "write"]

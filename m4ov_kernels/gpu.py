"""What every family's ``triton.py`` shares: launch configurations, device guard, and the declaration of its kernels.

A family declares its kernels in one table, ``KERNELS`` in its ``triton.py``: a :class:`Build` for each compilation of a
Triton kernel (one per shipped configuration, from :mod:`m4ov_kernels.configs`) and a :class:`CudaBuild` for each kernel
of its ``csrc/<family>/*.cu``. ``m4ov kernels check`` compiles all of them without a GPU (:mod:`m4ov_kernels.lockfile`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Passed to every launch. A multiply and an add that the compiler fuses round once instead of twice, so fusing would
# make the rounding contracts depend on the compiler; Triton 3.10 flips its default. These kernels wait for memory.
FP_FUSION = False

# What Triton kernels are compiled for where there is no GPU.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}  # bytes

_HERE = nullcontext()


@dataclass(frozen=True)
class Work:
    """The least that one launch must do at a stated problem: bytes read and written once each, and floating-point
    operations (an addition, a multiplication, a division or a transcendental function is one)."""

    problem: str
    bytes: int
    flops: int


@dataclass(frozen=True)
class Build:
    """One compilation of one Triton kernel: what the launcher would compile for these dtypes and widths.

    ``signature``: the types of the arguments that are no constexprs, in order, separated by blanks, as Triton writes
    them; ``T`` stands for ``dtype``, and a trailing ``/16`` marks a pointer or integer that is a multiple of 16.
    ``hot``: runs in every step of a training run, so it may not spill; a cold one (a fallback for odd sizes) may use
    local memory, but never float64.
    ``work``: the cost model; every kernel has one.
    ``matrix``: multiplies matrices, so it must use the tensor cores, on sm_90 through wgmma.
    ``targets``: the architectures that this configuration is shipped for.
    """

    kernel: Any
    dtype: str
    signature: str
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    hot: bool = True
    note: str = ""
    work: Work | None = None
    matrix: bool = False
    targets: tuple[str, ...] = ARCHITECTURES

    @property
    def name(self) -> str:
        return f"{self.kernel.__name__.strip('_')}[{self.dtype}{', ' if self.note else ''}{self.note}]"


@dataclass(frozen=True)
class CudaBuild:
    """The instances of one kernel of ``csrc/<family>/*.cu`` for one dtype.

    ``pattern``: of their demangled names, as :mod:`fnmatch` reads it: ``rms_norm_fwd_kernel<float, *>``.
    ``wgmma``: a matrix kernel without it is one that has too few rows for its tiles of 64, and waits for memory.
    Other fields as in :class:`Build`.
    """

    pattern: str
    dtype: str
    hot: bool = True
    work: Work | None = None
    matrix: bool = False
    wgmma: bool = True

    @property
    def name(self) -> str:
        return self.pattern


@dataclass(frozen=True)
class Config:
    """How a kernel is launched for one width: block sizes (constexprs of the kernel), warps and pipeline stages."""

    constexprs: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        stages = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**self.constexprs, **stages, "enable_fp_fusion": FP_FUSION}


def architecture(device: torch.device) -> str:
    """``"sm_90"`` or ``"gfx942"`` for a GPU; ``"cpu"``, where Triton interprets."""
    if device.type != "cuda":
        return "cpu"
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]  # "gfx942:sramecc+:xnack-"
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def current_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of ``tensor`` the current one, which is where Triton launches."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)

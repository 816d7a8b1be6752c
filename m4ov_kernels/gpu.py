"""What every family's ``triton.py`` shares: launch configurations, device guard, and the declaration of its kernels.

A family declares its kernels in one table, ``KERNELS``: a list of :class:`Build`, one per shipped configuration.
``m4ov_kernels.lockfile`` compiles each of them for every target without a GPU and holds them to budgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Passed to every launch. A multiply and an add that the compiler fuses round once instead of twice, so fusing would
# make the rounding contracts depend on the compiler; Triton 3.10 flips its default. These kernels wait for memory.
FP_FUSION = False

_HERE = nullcontext()


@dataclass(frozen=True)
class Build:
    """One compilation of one kernel: what the launcher would compile for these dtypes and widths.

    ``signature``: the types of the arguments that are no constexprs, in order, separated by blanks, as Triton writes
    them; ``T`` stands for ``dtype``, and a trailing ``/16`` marks a pointer or integer that is a multiple of 16.
    ``hot``: runs in every step of a training run, so it may not spill; a cold one (a fallback for odd sizes) may use
    local memory, but never float64.
    """

    kernel: Any
    dtype: str
    signature: str
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    hot: bool = True
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.kernel.__name__.strip('_')}[{self.dtype}{', ' if self.note else ''}{self.note}]"


@dataclass(frozen=True)
class Config:
    """How a kernel is launched for one width: block sizes (constexprs of the kernel) and warps."""

    constexprs: dict[str, int] = field(default_factory=dict)
    num_warps: int = 4

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        return {**self.constexprs, "num_warps": self.num_warps, "enable_fp_fusion": FP_FUSION}


def current_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of ``tensor`` the current one, which is where Triton launches."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)

"""How the Triton launchers of the norms choose between whole and wide rows, and how many programs share a gradient."""

from __future__ import annotations

from torch import Tensor

from m4ov_kernels import configs
from m4ov_kernels.gpu import Config


def whole_row(kernel: str, tensor: Tensor, width: int) -> Config | None:
    """How rows of this width are kept in registers; ``None``: they are too wide for that."""
    config = configs.find(kernel, tensor, width)
    if config and config.constexprs["BLOCK_D"] < width:
        raise ValueError(f"configuration of {kernel} at {width}: expected BLOCK_D to hold the row, got {config}")
    return config


def programs_for(blocks: int, width: int, whole: bool) -> int:
    """How many partial weight gradients: at most 4 MiB of them for whole rows, enough to fill a large GPU."""
    most = max(256, min(1024, 2**20 // width)) if whole else 64
    return max(1, min(blocks, most))

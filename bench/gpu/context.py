"""What a stage is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from m4ov_bench.gpu.part import Part


@dataclass(frozen=True)
class Context:
    """``tiny``: sizes for a dry run. ``source``: the checkout. ``work``: a folder for the stage's own files."""

    part: Part
    device: torch.device
    tiny: bool
    operator: str
    source: Path
    work: Path
    seed: int

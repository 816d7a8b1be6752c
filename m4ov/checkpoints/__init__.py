"""What checkpoints are, from format to format, and whether two of them are alike."""

from __future__ import annotations

from m4ov.checkpoints.comparison import Comparison, verify
from m4ov.checkpoints.conversion import Options, Result, convert
from m4ov.checkpoints.folder import Checkpoint, open_checkpoint
from m4ov.checkpoints.inspection import Report, inspect
from m4ov.checkpoints.names import PARTS

__all__ = [
    "PARTS",
    "Checkpoint",
    "Comparison",
    "Options",
    "Report",
    "Result",
    "convert",
    "inspect",
    "open_checkpoint",
    "verify",
]

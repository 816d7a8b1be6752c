"""The one training loop."""

from __future__ import annotations

from m4ov.train.checkpoint import CheckpointError
from m4ov.train.folder import RunFolder, RunFolderError, write_text
from m4ov.train.loop import Interrupted, TrainingError, TrainResult, train
from m4ov.train.optim import Optimizer

__all__ = [
    "CheckpointError",
    "Interrupted",
    "Optimizer",
    "RunFolder",
    "RunFolderError",
    "TrainResult",
    "TrainingError",
    "train",
    "write_text",
]

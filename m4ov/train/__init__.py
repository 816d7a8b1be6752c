"""The one training loop."""

from __future__ import annotations

from m4ov.parallel.checkpoint import CheckpointError
from m4ov.train.folder import RunFolder, RunFolderError
from m4ov.train.loop import Callback, Data, Interrupted, TrainingError, TrainResult, train
from m4ov.train.metrics import MetricsError
from m4ov.train.optim import Optimizer
from m4ov.train.world import RankError, World, ranks_started

__all__ = [
    "Callback",
    "CheckpointError",
    "Data",
    "Interrupted",
    "MetricsError",
    "Optimizer",
    "RankError",
    "RunFolder",
    "RunFolderError",
    "TrainResult",
    "TrainingError",
    "World",
    "ranks_started",
    "train",
]

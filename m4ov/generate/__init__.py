"""The one decoding engine: continuous batching, prefix sharing, and log-probabilities in the trainer's numerics."""

from __future__ import annotations

from m4ov.generate.engine import Engine
from m4ov.generate.options import FINISH_REASONS, Completion, RequestError, SamplingOptions

__all__ = ["FINISH_REASONS", "Completion", "Engine", "RequestError", "SamplingOptions"]

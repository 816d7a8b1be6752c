"""Supervised training."""

from __future__ import annotations

from m4ov.sft.compare import Comparison, Side, compare
from m4ov.sft.layout import layout_of
from m4ov.sft.task import Task, prepare
from m4ov.sft.training import fingerprint, run

__all__ = ["Comparison", "Side", "Task", "compare", "fingerprint", "layout_of", "prepare", "run"]

"""Supervised training: one run, and curricula of stages with gates."""

from __future__ import annotations

from m4ov.sft.compare import Comparison, Side, compare
from m4ov.sft.curriculum import ArmEnd, Material, arms_of, fingerprint_of, gather, missing_pools, run_arm
from m4ov.sft.layout import layout_of, sizes_of
from m4ov.sft.task import Task, prepare
from m4ov.sft.training import fingerprint, run, whole_of

__all__ = [
    "ArmEnd",
    "Comparison",
    "Material",
    "Side",
    "Task",
    "arms_of",
    "compare",
    "fingerprint",
    "fingerprint_of",
    "gather",
    "layout_of",
    "missing_pools",
    "prepare",
    "run",
    "run_arm",
    "sizes_of",
    "whole_of",
]

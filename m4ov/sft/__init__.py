"""Supervised training: arms of stages with gates, under every layout; and steps with and without the patch."""

from __future__ import annotations

from m4ov.sft.compare import Comparison, Side, compare
from m4ov.sft.curriculum import ArmEnd, check, run_arm
from m4ov.sft.layout import layout_of, sizes_of
from m4ov.sft.material import (
    Material,
    arms_of,
    digests,
    fingerprint_of,
    flat,
    gather,
    material_of,
    missing_pools,
    say_left_out,
)
from m4ov.sft.task import Task, task_of

__all__ = [
    "ArmEnd",
    "Comparison",
    "Material",
    "Side",
    "Task",
    "arms_of",
    "check",
    "compare",
    "digests",
    "fingerprint_of",
    "flat",
    "gather",
    "layout_of",
    "material_of",
    "missing_pools",
    "run_arm",
    "say_left_out",
    "sizes_of",
    "task_of",
]

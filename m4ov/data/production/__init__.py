"""Data production: images with ground truth in, checked records out, in four stages that can be cut off anywhere."""

from __future__ import annotations

from m4ov.data.production.flow import STEPS, Production, build, finished
from m4ov.data.production.steps import BuildError

__all__ = ["STEPS", "BuildError", "Production", "build", "finished"]
